"""DeepSeek-V2 (V2-Lite and relatives): softmax router that does not renormalise, shared experts, latent attention."""

from __future__ import annotations

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import deepseek, deepseek_megatron
from megatron_moe2dense.families.spec import FamilySpec, GroupLimit, HfConfig, Router


def _router(config: HfConfig) -> Router:
    method = config.get("topk_method", "greedy")
    scaling = config.get("routed_scaling_factor", 1.0)
    if method == "greedy":
        return Router("softmax", renormalize=False, scaling=scaling)  # the stock class does not read norm_topk_prob
    if method == "group_limited_greedy":
        limit = GroupLimit(config["n_group"], config["topk_group"], rank_by="best")
        return Router("softmax", renormalize=False, scaling=scaling, limit=limit)
    raise UserError(f"config.json: topk_method {method!r}", "greedy or group_limited_greedy", "use a model with one of these routers")


DEEPSEEK_V2 = FamilySpec(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    dims=deepseek.dims,
    ffn=deepseek.FFN,
    megatron=deepseek_megatron.MEGATRON,
    megatron_config=deepseek_megatron.megatron_config,
    moe=deepseek.layouts(),
    moe_layers=deepseek.moe_layers,
    router=_router,
)
