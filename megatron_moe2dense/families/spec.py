"""What a model family is to the trainer, beside what its stock class says: router, Megatron-Core names and TransformerConfig fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

HfConfig = Mapping[str, Any]
# Of an FFN: what goes into the neurons (gate and up), and what comes out of them.
Part = Literal["up", "down", "up_bias", "down_bias"]


@dataclass(frozen=True)
class Dims:
    """Sizes of one model. `experts == 0` means a dense model.

    head_dim: width of a query head. value_dim: of a value head, which latent attention has narrower.
    shared_width: of all shared experts of a layer together.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    norm_eps: float
    rope_theta: float
    dense_width: int
    experts: int = 0
    active: int = 0
    expert_width: int = 0
    shared_width: int = 0


@dataclass(frozen=True)
class GroupLimit:
    """Experts may come from the `used` best of `groups` equal blocks of experts only.

    rank_by: a block's rank is its best score, or the sum of its two best.
    """

    groups: int
    used: int
    rank_by: Literal["best", "two_best"]


@dataclass(frozen=True)
class Router:
    """How a MoE layer routes: score over all experts, the best `active` (scores plus the correction where the family has one,
    within the group limit), gates = score of the selected experts [renormalised] * scaling."""

    score: Literal["softmax", "sigmoid"]
    renormalize: bool
    scaling: float = 1.0
    limit: GroupLimit | None = None


@dataclass(frozen=True)
class FfnPart:
    """Of the FFN of a layer without experts, of an expert or of the shared experts."""

    of: Literal["dense", "experts", "shared"]
    part: Part


@dataclass(frozen=True)
class WeightRule:
    """One row of the weight-name table between Megatron-Core and the stock class.

    megatron: name with `{layer}` (global number) and `{expert}` (global number) where it has them.
    made_of: the tensors of the stock class that it is made of, with `{router}` and `{shared_gate}` for these modules of the layer; or a
        part of an FFN, which stands where the class has it (families/ffn.py).
    kind: how.
        plain    one tensor, the same layout
        qkv      q, k, v -> per KV group [q heads of the group; k; v] along axis 0
        gate_up  gate, up -> [gate; up] along axis 0, each split by tensor parallelism on its own
        vocab    one tensor with a row per vocabulary entry, padded with zero rows in Megatron
    split: the axis that tensor parallelism splits, None when replicated; "expert" splits follow the expert-TP group.
    aliases: names of the same tensor under other layer specs (Transformer Engine fuses norms into linears).
    """

    megatron: str
    made_of: tuple[str, ...] | FfnPart
    kind: Literal["plain", "qkv", "gate_up", "vocab"] = "plain"
    split: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilySpec:
    """One model family. Callables take config.json as its stock class understands it, every key with a value, and return plain data.

    attention: the rows of its attention. megatron_config(config): TransformerConfig fields the family needs, as plain data (activation
        by its name). router(config): how layers with experts route.
    axes: of every tensor of a dense family what its axes count (families/axes.py); None: the family can not be pruned to a shape.
    """

    name: str
    attention: tuple[WeightRule, ...]
    megatron_config: Callable[[HfConfig], dict[str, Any]]
    router: Callable[[HfConfig], Router] | None = None
    axes: Mapping[str, str] | None = None
