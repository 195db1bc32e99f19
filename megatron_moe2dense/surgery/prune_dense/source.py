"""A dense checkpoint as pruning sees it: every tensor's axes, presence and shape checked; and the shapes it can be cut to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES, Dims, FamilySpec, family_of
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.stock import Stock


@dataclass(frozen=True)
class Shape:
    """The sizes that pruning changes, by their names in config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key and value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class AxesOf:
    """One tensor: its name template, the layer it belongs to (None: to none), and a letter an axis (families/axes.py)."""

    template: str
    layer: int | None
    axes: str

    def name(self, layer: int | None) -> str:
        """Its name as one of layer `layer`."""
        return self.template.format(layer=layer)


@dataclass(frozen=True)
class DenseSource:
    """An opened dense checkpoint of a family whose axes are known. account: of its tensors."""

    account: Account
    spec: FamilySpec

    @classmethod
    def open(cls, directory: str | Path) -> DenseSource:
        """Read headers and check all tensors against what the stock class holds.

        Raises:
            UserError: a family that can not be pruned, damaged files, tensors missing, unknown, quantised or of another shape.
        """
        return cls.of(CheckpointIndex.open(directory))

    @classmethod
    def of(cls, index: CheckpointIndex) -> DenseSource:
        """As `open`, of an index that was read already."""
        spec = family_of(index.config, str(index.directory / "config.json"))
        if spec.axes is None:
            known = [name for name, other in FAMILIES.items() if other.axes is not None]
            do = "convert it first: `moe2dense convert` makes a MoE dense" if spec.router else "prune a model of one of these"
            raise UserError(f"{index.directory}: a {spec.name} model", f"a dense model: {', '.join(known)}", do)
        return cls(Account.of(index, Stock.of(index.config, str(index.directory / "config.json"))), spec)

    @property
    def dims(self) -> Dims:
        """Its sizes."""
        return self.account.stock.dims

    @property
    def index(self) -> CheckpointIndex:
        """The opened files."""
        return self.account.index

    @cached_property
    def tensors(self) -> dict[str, AxesOf]:
        """By name, every tensor that a checkpoint of this family and size may hold: those of no layer first, then layer by layer."""
        assert self.spec.axes is not None, "checked when it was opened"
        trunk = [AxesOf(template, None, axes) for template, axes in self.spec.axes.items() if "{layer}" not in template]
        in_layers = [(template, axes) for template, axes in self.spec.axes.items() if "{layer}" in template]
        rest = [AxesOf(template, layer, axes) for layer in range(self.dims.layers) for template, axes in in_layers]
        return {tensor.name(tensor.layer): tensor for tensor in (*trunk, *rest)}

    @property
    def shape(self) -> Shape:
        """Its own."""
        dims = self.dims
        return Shape(dims.hidden_size, dims.layers, dims.heads, dims.kv_heads, dims.dense_width)

    @cached_property
    def fingerprint(self) -> str:
        """Hash that tells these weights from others (CheckpointIndex.fingerprint)."""
        return self.index.fingerprint()

    def facts(self) -> dict[str, Any]:
        """What manifests record of the source."""
        found = {"fingerprint": self.fingerprint, "family": self.spec.name}
        return {"path": str(self.index.directory), **hub.revision_of(self.index.directory), **found}

    def layer_prefix(self, layer: int) -> str:
        """What the names of all tensors of a layer begin with."""
        return f"model.layers.{layer}."

    def present(self, layer: int | None) -> Iterator[AxesOf]:
        """The tensors that the checkpoint really holds of a layer, or of none."""
        return (tensor for name, tensor in self.tensors.items() if tensor.layer == layer and name in self.account.values.shapes)

    def sizes(self, tensor: AxesOf, shape: Shape) -> tuple[int, ...]:
        """The shape of a tensor in a model of `shape`."""
        dims = self.dims
        by_letter = {
            "V": dims.vocab_size,
            "D": shape.hidden_size,
            "F": shape.intermediate_size,
            "Q": shape.num_attention_heads * dims.head_dim,
            "K": shape.num_key_value_heads * dims.head_dim,
            "H": dims.head_dim,
        }
        return tuple(by_letter[letter] for letter in tensor.axes)

    def parameters(self, shape: Shape) -> int:
        """Parameters of a model of `shape`."""
        trunk, layer = (sum(prod(self.sizes(tensor, shape)) for tensor in self.present(of)) for of in (None, 0))
        return trunk + shape.num_hidden_layers * layer

    def smaller_config(self, shape: Shape, layers: Sequence[int]) -> dict[str, Any]:
        """config.json of this model cut to a smaller shape. A layer that stays keeps its kind of attention, wherever it moves to.

        Args:
            layers: numbers of the source's layers that stay.
        """
        config = self.account.config
        types = self.account.stock.config.layer_types if "layer_types" in config or config.get("use_sliding_window") else None
        kinds = {} if types is None else {"layer_types": [types[layer] for layer in layers]}
        # with head_dim, which hidden_size no longer tells
        return {**config, **dataclasses.asdict(shape), "head_dim": self.dims.head_dim, **kinds}
