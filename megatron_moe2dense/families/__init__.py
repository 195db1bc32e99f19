"""Model families as data: one declarative instance each, read by surgery, trainer and evals alike. No torch.

A `model_type` string stands nowhere else in the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.families.deepseek_v2 import DEEPSEEK_V2
from megatron_moe2dense.families.deepseek_v3 import DEEPSEEK_V3
from megatron_moe2dense.families.gpt_oss import GPT_OSS
from megatron_moe2dense.families.layout import FfnTensors, MoeTensors
from megatron_moe2dense.families.mistral import MISTRAL
from megatron_moe2dense.families.mixtral import MIXTRAL
from megatron_moe2dense.families.olmoe import OLMOE
from megatron_moe2dense.families.qwen2 import QWEN2
from megatron_moe2dense.families.qwen2_moe import QWEN2_MOE
from megatron_moe2dense.families.qwen3 import QWEN3
from megatron_moe2dense.families.qwen3_moe import QWEN3_MOE
from megatron_moe2dense.families.smaller import smaller_config
from megatron_moe2dense.families.spec import Dims, FamilySpec, GroupLimit, Router, WeightRule

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec for spec in (QWEN3_MOE, DEEPSEEK_V2, GPT_OSS, OLMOE, MIXTRAL, QWEN2_MOE, DEEPSEEK_V3, QWEN3, MISTRAL, QWEN2)
}

__all__ = [
    "FAMILIES",
    "Dims",
    "FamilySpec",
    "FfnTensors",
    "GroupLimit",
    "MoeTensors",
    "Router",
    "WeightRule",
    "family_of",
    "smaller_config",
]


def family_of(config: Mapping[str, Any], where: str) -> FamilySpec:
    """The family of a Hugging Face config; UserError when it is not supported or a size is missing.

    Args:
        config: the content of config.json. where: its path, for the message.
    """
    found = config.get("model_type")
    if found not in FAMILIES:
        hint = did_you_mean(str(found), FAMILIES)
        raise UserError(
            f"{where}: model_type {found!r}", f"one of {', '.join(FAMILIES)}", hint or "docs/adding.md says how to add a family"
        )
    spec = FAMILIES[str(found)]
    try:
        spec.dims(config)
    except KeyError as error:
        raise UserError(f"{where}: no key {error}", f"the config of a {spec.name} model", "take the model's own config.json") from None
    return spec
