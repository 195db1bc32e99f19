"""The router's forward pass from a family's Router data: which experts a token gets, with which weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_moe2dense.families import GroupLimit, Router


@dataclass(frozen=True)
class RouterWeights:
    """weight_ED: the router matrix. bias_E: added to the logits. correction_E: added to the scores in the selection only."""

    weight_ED: torch.Tensor
    bias_E: torch.Tensor | None = None
    correction_E: torch.Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """experts_TA: the selected experts. gates_TA: the weights that multiply their outputs. probs_TE: scores of all experts."""

    experts_TA: torch.Tensor
    gates_TA: torch.Tensor
    probs_TE: torch.Tensor


def route(x_TD: torch.Tensor, weights: RouterWeights, router: Router, active: int) -> Routing:
    """Route tokens, in float32 at least (as the stock models do from the logits on)."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TE = x_TD.to(dtype) @ weights.weight_ED.to(dtype).T
    if weights.bias_E is not None:
        logits_TE = logits_TE + weights.bias_E.to(dtype)
    probs_TE = logits_TE.softmax(-1) if router.score == "softmax" else logits_TE.sigmoid()
    choice_TE = probs_TE if weights.correction_E is None else probs_TE + weights.correction_E.to(dtype)
    if router.limit is not None:
        choice_TE = _limited(choice_TE, router.limit)
    experts_TA = choice_TE.topk(active, dim=-1).indices
    chosen_TA = probs_TE.gather(1, experts_TA)
    if router.renormalize:
        chosen_TA = chosen_TA / chosen_TA.sum(-1, keepdim=True)
    return Routing(experts_TA, chosen_TA * router.scaling, probs_TE)


def _limited(choice_TE: torch.Tensor, limit: GroupLimit) -> torch.Tensor:
    """-inf for experts outside the best blocks of experts."""
    blocks_TGB = choice_TE.unflatten(-1, (limit.groups, -1))
    rank_TG = blocks_TGB.amax(-1) if limit.rank_by == "best" else blocks_TGB.topk(2, dim=-1).values.sum(-1)
    outside_TG = torch.ones_like(rank_TG, dtype=torch.bool).scatter_(1, rank_TG.topk(limit.used, dim=-1).indices, False)
    return blocks_TGB.masked_fill(outside_TG[..., None], float("-inf")).flatten(1)
