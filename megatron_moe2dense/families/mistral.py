"""Mistral, and Mixtral: Mistral with softmax-routed experts, renormalised."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.families.axes import decoder_axes
from megatron_moe2dense.families.megatron import attention_rules, grouped_query_fields, window_fields
from megatron_moe2dense.families.spec import FamilySpec, HfConfig, Router


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    return {**grouped_query_fields(config), **window_fields(config)}


MISTRAL = FamilySpec("mistral", attention_rules(), _megatron_config, axes=decoder_axes())
MIXTRAL = FamilySpec("mixtral", attention_rules(), _megatron_config, lambda _config: Router("softmax", renormalize=True))
