"""Matrix products of the student in FP8, by Transformer Engine inside Megatron-Core: which recipe runs where, and its config fields."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.config import Fp8Config
from megatron_moe2dense.trainer.runtime import Runtime

# Least compute capability of each recipe in Transformer Engine (its `check_*_support` functions): Ada, Hopper, Blackwell.
_LEAST = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# Amax history of the delayed recipe as in Megatron-Core's own recipes for Hopper; TransformerConfig's default of 1 follows every outlier.
_DELAYED = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}


def require(config: Fp8Config, runtime: Runtime) -> None:
    """UserError without Transformer Engine, or on a GPU whose tensor cores do not know the recipe."""
    if not runtime.transformer_engine:
        raise UserError(
            f"fp8: {config.recipe} on {runtime.device.type} without Transformer Engine",
            "a GPU and Transformer Engine, whose kernels compute in FP8",
            "remove the fp8 block, or install 'transformer-engine[pytorch]' on a GPU machine",
        )
    found, least = torch.cuda.get_device_capability(runtime.device), _LEAST[config.recipe]
    if found < least:
        raise UserError(
            f"fp8: {config.recipe} on a GPU of sm_{found[0]}{found[1]}",
            f"sm_{least[0]}{least[1]} or later",
            "choose another fp8.recipe, or remove the fp8 block",
        )


def fields(config: Fp8Config | None, runtime: Runtime) -> dict[str, Any]:
    """TransformerConfig fields; none without the block. Weights stay in bfloat16, and attention is computed in it.

    Raises:
        UserError: see `require`.
    """
    if config is None:
        return {}
    require(config, runtime)
    chosen = {"fp8": config.format, "fp8_recipe": config.recipe}
    return chosen | (_DELAYED if config.recipe == "delayed" else {})
