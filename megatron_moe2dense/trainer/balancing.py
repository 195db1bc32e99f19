"""The balancing losses of a MoE student: a step adds, for every MoE layer, their mean over its micro-batches, whatever layout and masks.

Load balancing is the Switch Transformer's, E * sum over experts of (share of the choices) * (mean probability), which is 1 when even;
the z-loss is ST-MoE's, the mean square of the router's logsumexp. Both see all tokens of a micro-batch, masked ones too: those are routed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.config import DistillConfig, MoeConfig
from megatron_moe2dense.trainer.data.samples import Batch
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec


def require(config: DistillConfig, student: ModelSpec) -> str:
    """What is asked for; UserError for a `moe` block with a dense student."""
    if config.moe is not None and not student.dims.experts:
        raise UserError(f"moe block, but {config.student} is dense", "a MoE student", "remove the moe block")
    return "none" if config.moe is None else f"aux_loss {config.moe.aux_loss}, z_loss {config.moe.z_loss}"


def fields(config: DistillConfig) -> dict[str, Any]:
    """TransformerConfig fields of the balancing losses."""
    if config.moe is None:
        return {}
    return {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": config.moe.aux_loss,
        "moe_z_loss_coeff": config.moe.z_loss or None,
    }


def weigh(settings: MoeConfig, chunks: Sequence[HeadlessGPT], batches: Sequence[Batch], groups: Groups) -> None:
    """Set the coefficients for one step.

    Megatron-Core divides the gradients of a step by its unmasked tokens, those of the balancing losses with the others: each
    micro-batch's are multiplied by these tokens and divided by the number of micro-batches.

    Args:
        batches: this rank's, of whole sequences.
    """
    tokens = torch.stack([batch.mask.sum(dtype=torch.float64) for batch in batches]).sum()
    if groups.data_size > 1:
        dist.all_reduce(tokens, group=groups.collection.dp)
    factor = float(tokens) / (len(batches) * groups.data_size)
    shared: Any = chunks[0].config  # one object, shared by all chunks
    shared.moe_aux_loss_coeff = settings.aux_loss * factor
    shared.moe_z_loss_coeff = settings.z_loss * factor or None
