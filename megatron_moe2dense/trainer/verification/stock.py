"""Logits of the stock transformers forward, the judge of a teacher built by Megatron-Core: the one place of the trainer that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.pretrained import load_pretrained

# Beside the weights: one shard that is being read, and activations.
_MARGIN = 1.25


def host_bytes(index: CheckpointIndex, dtype: torch.dtype) -> int:
    """Bytes of host memory that the stock model takes, with its margin."""
    return int(Values(index).total * dtype.itemsize * _MARGIN)


@torch.no_grad()
def logits(directory: Path, dtype: torch.dtype, tokens_S: Tensor, active: int | None) -> Tensor:
    """float32 logits [S, V] of one sequence, on the CPU; the model is loaded for it and dropped.

    Args:
        active: experts per token, None: the model's own number.

    Raises:
        UserError: stock transformers does not load the checkpoint whole.
    """
    options: dict[str, Any] = {} if active is None else {"num_experts_per_tok": active}
    try:
        model, info = load_pretrained(CheckpointIndex.open(directory), dtype=dtype, **options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{directory}: {error}",
            "a checkpoint that stock transformers loads",
            "check config.json and weights, or set teacher.check.stock_forward=never",
        ) from error
    if info["missing_keys"]:
        raise UserError(
            f"{directory}: stock transformers misses {sorted(info['missing_keys'])[0]}",
            "every tensor of the model",
            "check that config.json and the weights are of the same model",
        )
    return model.eval()(input_ids=tokens_S[None].cpu(), use_cache=False).logits[0].float()
