"""DeepSeek-V3: sigmoid router with a correction bias for the selection and group limits, shared experts, latent attention."""

from __future__ import annotations

from megatron_moe2dense.families import deepseek, deepseek_megatron
from megatron_moe2dense.families.spec import FamilySpec, GroupLimit, HfConfig, Router


def _router(config: HfConfig) -> Router:
    return Router(
        "sigmoid",
        renormalize=bool(config.get("norm_topk_prob", True)),
        scaling=config.get("routed_scaling_factor", 2.5),
        limit=GroupLimit(config.get("n_group", 8), config.get("topk_group", 4), rank_by="two_best"),
    )


DEEPSEEK_V3 = FamilySpec(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    dims=deepseek.dims,
    ffn=deepseek.FFN,
    megatron=(*deepseek_megatron.MEGATRON, deepseek_megatron.CORRECTION),
    megatron_config=deepseek_megatron.megatron_config,
    moe=deepseek.layouts(correction=deepseek.BLOCK + "gate.e_score_correction_bias"),
    moe_layers=deepseek.moe_layers,
    router=_router,
)
