"""Model families: what stock classes say (stock, ffn, disk, probe, dense), one table of exceptions (table), and, for the trainer, what is
needed to build one in Megatron-Core, as data without torch.

A `model_type` string stands nowhere else in the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_moe2dense.families.gpt_oss import GPT_OSS
from megatron_moe2dense.families.mistral import MISTRAL, MIXTRAL
from megatron_moe2dense.families.olmoe import OLMOE
from megatron_moe2dense.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from megatron_moe2dense.families.spec import Dims, FamilySpec, FfnPart, GroupLimit, Router, WeightRule

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec for spec in (QWEN3_MOE, DEEPSEEK_V2, GPT_OSS, OLMOE, MIXTRAL, QWEN2_MOE, DEEPSEEK_V3, QWEN3, MISTRAL, QWEN2)
}

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

__all__ = ["FAMILIES", "Dims", "FamilySpec", "FfnPart", "GroupLimit", "Router", "WeightRule", "family_of"]


def family_of(config: Mapping[str, Any], where: str) -> FamilySpec:
    """The trainer's family of a Hugging Face config; UserError when it has none, or when a size is missing.

    Args:
        config: the content of config.json. where: its path, for the message.
    """
    found = config.get("model_type")
    if found not in FAMILIES:
        hint = did_you_mean(str(found), FAMILIES)
        raise UserError(
            f"{where}: model_type {found!r}", f"one of {', '.join(FAMILIES)}", hint or "docs/adding.md says how to add a family"
        )
    missing = [name for name in _SIZES if name not in config]
    if missing:
        raise UserError(f"{where}: no key {missing[0]!r}", f"the config of a {found} model", "take the model's own config.json")
    return FAMILIES[str(found)]
