"""The family's router in Megatron-Core: config fields, and limits to groups of experts as the family ranks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import Router


def router_fields(router: Router, experts: int, correction: bool) -> dict[str, Any]:
    """TransformerConfig fields of a router. correction: it has a bias for the selection, which training leaves as it is."""
    limit = router.limit
    return {
        "moe_router_score_function": router.score,
        # Megatron's softmax after the top-k equals softmax, top-k, renormalise; it refuses to do so for one expert.
        "moe_router_pre_softmax": router.score == "softmax" and (not router.renormalize or experts == 1),
        "moe_router_topk_scaling_factor": router.scaling if router.scaling != 1.0 else None,
        "moe_router_num_groups": limit.groups if limit else None,
        "moe_router_group_topk": limit.used if limit else None,
        "moe_router_enable_expert_bias": correction,
        "moe_router_bias_update_rate": 0.0,
    }


def require_router(router: Router, experts: int, active: int) -> None:
    """UserError for sigmoid gates that are not renormalised, and for more active experts than the used groups have."""
    if router.score == "sigmoid" and not router.renormalize:
        raise UserError("config.json: sigmoid router, norm_topk_prob false", "norm_topk_prob true", "use another model")
    limit = router.limit
    within = experts if limit is None else experts // limit.groups * limit.used
    if limit is not None and active > within:
        found = f"{active} active experts, {limit.used} of {limit.groups} groups used"
        raise UserError(found, f"at most the {within} experts of these groups", "choose a smaller teacher.routing.active")


class GroupRanking:
    """Chooses experts within the best groups; stands where Megatron's router asks for a recorded choice.

    Megatron-Core 0.16 ranks a group by the sum of its `top-k // groups used` best scores, which is DeepSeek-V3's rule for its published
    sizes only, and not DeepSeek-V2's.
    """

    def __init__(self, best: int):
        self._best = best

    def get_replay_topk(self, scores: Tensor, topk: int, num_groups: int, group_topk: int, _otherwise: Callable) -> tuple[Tensor, Tensor]:
        """scores [T, E] to the chosen scores and expert numbers [T, topk]."""
        blocks = scores.unflatten(1, (num_groups, -1))
        rank = blocks.topk(self._best, dim=-1).values.sum(-1)
        used = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(group_topk, dim=1).indices, True)
        return torch.topk(blocks.masked_fill(~used.unsqueeze(-1), float("-inf")).flatten(1), topk, dim=1)


def finish_routers(model: torch.nn.Module, router: Router) -> None:
    """Give the routers of a model its family's group ranking, their correction float32 whatever the model's type, and balancing losses
    that are means (see `_without_token_count`).

    Raises:
        UserError: see `require_router`.
    """
    for module in model.modules():
        if not isinstance(module, TopKRouter):
            continue
        module._maintain_float32_expert_bias()
        require_router(router, module.weight.shape[0], module.topk)
        _without_token_count(module)
        if router.limit is None:
            continue
        ranking: Any = GroupRanking({"best": 1, "two_best": 2}[router.limit.rank_by])
        module.router_replay = ranking


def _without_token_count(router: TopKRouter) -> None:
    """Balancing losses as they are without `calculate_per_token_loss`: a micro-batch's mean.

    With it Megatron-Core (all versions) multiplies each rank's part by the tokens of that rank, where context and sequence parallelism
    share those of a micro-batch: half of the loss on two ranks. And it takes masked tokens into a count that is divided by the others'.
    `balancing.weigh` sets the count instead.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.0/megatron/core/transformer/moe/router.py#L458
    """
    router.calculate_per_token_loss = False
