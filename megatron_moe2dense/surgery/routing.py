"""The router's forward pass from a family's Router data: which experts a token gets, with which weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_moe2dense.families import Router


@dataclass(frozen=True)
class Routing:
    """experts_TA: the selected experts. gates_TA: the weights that multiply their outputs. probs_TE: scores of all experts."""

    experts_TA: torch.Tensor
    gates_TA: torch.Tensor
    probs_TE: torch.Tensor


def route(x_TD: torch.Tensor, weight_ED: torch.Tensor, router: Router, active: int) -> Routing:
    """Route tokens, in float32 at least (as the stock models do from the logits on)."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TE = x_TD.to(dtype) @ weight_ED.to(dtype).T
    probs_TE = logits_TE.softmax(-1) if router.score == "softmax" else logits_TE.sigmoid()
    chosen_TA, experts_TA = probs_TE.topk(active, dim=-1)
    if router.renormalize:
        chosen_TA = chosen_TA / chosen_TA.sum(-1, keepdim=True)
    return Routing(experts_TA, chosen_TA * router.scaling, probs_TE)
