"""What a model family is to the trainer: sizes, router, where its tensors stand and the Megatron-Core name table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_moe2dense.families.layout import FfnTensors, MoeTensors, Packing

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Dims:
    """Sizes of one model, read from its config.json. `experts == 0` means a dense model.

    head_dim: width of a query head. shared_width: of all shared experts of a layer together.
    """

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
class WeightRule:
    """One row of the weight-name table between Megatron-Core and Hugging Face.

    Several rows for one Megatron name are the layouts found on disk: the first whose tensors the checkpoint has is read, and the first
    is written.

    megatron: name with `{layer}` (global number) and `{expert}` (global number) where it has them.
    hf: the Hugging Face tensors it is made of. kind: how.
        plain    one tensor, the same layout
        qkv      q, k, v -> per KV group [q heads of the group; k; v] along axis 0
        gate_up  gate, up (or one tensor of both) -> [gate; up] along axis 0, each split by tensor parallelism on its own
        vocab    one tensor with a row per vocabulary entry, padded with zero rows in Megatron
    split: the axis that tensor parallelism splits, None when replicated; "expert" splits follow the expert-TP group.
    aliases: names of the same tensor under other layer specs (Transformer Engine fuses norms into linears).
    packing: how `hf` store plain and gate_up tensors; where experts are stacked, the Megatron name tells which one is meant (the first,
        without a number).
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Literal["plain", "qkv", "gate_up", "vocab"] = "plain"
    split: int | None = None
    aliases: tuple[str, ...] = ()
    packing: Packing = field(default=Packing())


def _no_layers(_config: HfConfig) -> tuple[int, ...]:
    return ()


def _nothing_added(_config: HfConfig) -> dict[str, tuple[int, ...]]:
    return {}


@dataclass(frozen=True)
class FamilySpec:
    """One model family. Callables take the content of config.json and return plain data.

    architecture: class name of the stock transformers causal LM.
    ffn: the FFN of layers without experts, or of the one expert that stands in the place of all.
    megatron: the name table. megatron_config(config): TransformerConfig fields the family needs, as plain data
        (activation by its name). Both None: the trainer does not know the family.
    moe: where the MoE blocks stand, one entry for each layout found on disk; empty for a dense family.
    moe_layers(config): numbers of the layers with experts. router(config): how they route.
    axes: of every tensor of a dense family what its axes count (families/axes.py); None: the family can not be pruned to a shape.
    added(config): where the dense result is the class itself with one expert, what Megatron's dense model has no place for (its
        router): name templates with their shapes; exported as zeros.
    """

    name: str
    architecture: str
    dims: Callable[[HfConfig], Dims]
    ffn: FfnTensors
    megatron: tuple[WeightRule, ...] | None = None
    megatron_config: Callable[[HfConfig], dict[str, Any]] | None = None
    moe: tuple[MoeTensors, ...] = ()
    moe_layers: Callable[[HfConfig], tuple[int, ...]] = field(default=_no_layers)
    router: Callable[[HfConfig], Router] | None = None
    axes: Mapping[str, str] | None = None
    added: Callable[[HfConfig], dict[str, tuple[int, ...]]] = field(default=_nothing_added)
