"""What a model family is: sizes, router, expert tensors, dense target and the Megatron-Core name table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Dims:
    """Sizes of one model, read from its config.json. `experts == 0` means a dense model."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    norm_eps: float
    rope_theta: float
    dense_width: int
    experts: int = 0
    active: int = 0
    expert_width: int = 0


@dataclass(frozen=True)
class Router:
    """How a MoE layer routes. gates = score over the selected experts [renormalised] * scaling.

    weight: tensor name template of the router matrix [E, D].
    """

    weight: str
    score: Literal["softmax", "sigmoid"]
    renormalize: bool
    scaling: float = 1.0


@dataclass(frozen=True)
class FfnTensors:
    """Name templates (`{layer}`) of a dense gated FFN: gate and up [F, D], down [D, F]."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class ExpertTensors:
    """Name templates (`{layer}`, `{expert}`) of one expert: gate and up [I, D], down [D, I].

    module: the stock transformers module of the whole MoE block inside a decoder layer (e.g. `mlp`).
    """

    gate: str
    up: str
    down: str
    module: str = "mlp"


@dataclass(frozen=True)
class MegatronRule:
    """One row of the weight-name table between Megatron-Core and Hugging Face.

    megatron: name with `{layer}` (global number) and `{expert}` (global number) where it has them.
    hf: the Hugging Face tensors it is made of. kind: how.
        plain    one tensor, the same layout
        qkv      q, k, v -> per KV group [q heads of the group; k; v] along axis 0
        gate_up  gate, up -> [gate; up] along axis 0, each split by tensor parallelism on its own
        vocab    one tensor with a row per vocabulary entry, padded with zero rows in Megatron
    split: the axis that tensor parallelism splits, None when replicated; "expert" splits follow the expert-TP group.
    aliases: names of the same tensor under other layer specs (Transformer Engine fuses norms into linears).
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Literal["plain", "qkv", "gate_up", "vocab"] = "plain"
    split: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilySpec:
    """One model family. Callables take the content of config.json and return plain data.

    architecture: class name of the stock transformers causal LM.
    router, experts: None for a dense family; moe_layers: numbers of the layers with experts.
    ffn: names of the dense FFN tensors, for dense layers of the family.
    dense_target: family name of the dense result. dense_config(config, width): its config.json.
    megatron: the name table. megatron_config(config): TransformerConfig fields the family needs, as plain data
    (activation by its name).
    """

    name: str
    architecture: str
    dims: Callable[[HfConfig], Dims]
    ffn: FfnTensors
    megatron: tuple[MegatronRule, ...]
    megatron_config: Callable[[HfConfig], dict[str, Any]]
    moe_layers: Callable[[HfConfig], tuple[int, ...]] = field(default=lambda _config: ())
    router: Callable[[HfConfig], Router] | None = None
    experts: ExpertTensors | None = None
    dense_target: str | None = None
    dense_config: Callable[[HfConfig, int], dict[str, Any]] | None = None
