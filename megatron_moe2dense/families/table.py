"""What the stock classes do not say of themselves: for some families, in which class and form their dense result is exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class FamilyException:
    """How a family's dense result is found, where the search of `dense.py` would find another form or none.

    Attributes:
        sibling: model_type of a dense stock class with the same tensors outside the FFN.
        wrapper: of a language model inside another: type of that model around the sibling, where it is another than around the MoE.
        alone: the sibling of the language model without what is around it, where it is another one.
        experts: so many experts with constant gates, where the class has no dense layers that are otherwise the same.
        into: the dense FFN of the class that takes the neurons, path in the layer, in place of experts.
        config: keys of the dense config.json. values: of tensors that are neither copied nor made, by the end of their name.
        unless_sliding: settings of the MoE's modules that the sibling does not have: off, but in layers with a sliding window.
        refused: why there is no exact dense result.
        lost: what the dense result can not have of the MoE, beyond the routing itself.
    """

    sibling: str | None = None
    wrapper: str | None = None
    alone: str | None = None
    experts: Literal[0, 1, 2] = 0
    into: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    unless_sliding: tuple[str, ...] = ()
    refused: str = ""
    lost: str = ""


def exception_of(model_type: str) -> FamilyException:
    """The line of a type; one that says nothing where it has none."""
    return EXCEPTIONS.get(model_type, FamilyException())


EXCEPTIONS: dict[str, FamilyException] = {
    "qwen3_moe": FamilyException(sibling="qwen3"),
    "qwen2_moe": FamilyException(sibling="qwen2"),
    "mixtral": FamilyException(sibling="mistral"),
    "qwen3_5_moe_text": FamilyException(sibling="qwen3_5_text", wrapper="qwen3_5"),
    "qwen3_vl_moe_text": FamilyException(sibling="qwen3_vl_text", wrapper="qwen3_vl", alone="qwen3"),
    "qwen3_omni_moe_text": FamilyException(alone="qwen3"),
    "solar_open": FamilyException(sibling="llama"),
    "aria_text": FamilyException(sibling="llama"),
    "flex_olmo": FamilyException(sibling="olmo2"),
    "granitemoe": FamilyException(sibling="granite"),
    "hunyuan_v1_moe": FamilyException(sibling="hunyuan_v1_dense"),
    "lfm2_moe": FamilyException(sibling="lfm2", config={"block_auto_adjust_ff_dim": False}),
    "cohere2_moe": FamilyException(sibling="cohere2", unless_sliding=("force_rope",)),
    # Their dense layers have other norms; one expert alone leaves too few for the groups of the router, or no softmax to take.
    "axk1": FamilyException(experts=2),
    "axk2": FamilyException(experts=2),
    "phimoe": FamilyException(experts=2),
    "longcat_flash": FamilyException(experts=2, config={"zero_expert_num": 0}, lost="identity experts"),
    # Its dense layers do not hold their neurons back as its experts do.
    "step3p5": FamilyException(experts=1),
    "kolibri1": FamilyException(experts=1, config={"norm_topk_prob": True}),
    "gemma4_text": FamilyException(experts=1, values={"per_expert_scale": [1.0]}),
    "zaya": FamilyException(experts=1, values={"balancing_biases": [0.0, -1.0]}, lost="the class that skips the block"),
    "granitemoehybrid": FamilyException(into="shared_mlp", config={"num_local_experts": 0}),
    "inkling_text": FamilyException(refused="its shared experts are weighed together with the routed ones, token by token"),
    "jetmoe": FamilyException(refused="its attention is a mixture of experts too, counted by the same key"),
    "ernie4_5_vl_moe_text": FamilyException(refused="it has experts for text and experts for images, chosen by the kind of token"),
    "hy_v4": FamilyException(refused="its experts clamp their neurons, its dense layers and shared experts do not"),
    "doge": FamilyException(refused="its experts are single neurons without gates"),
}
