"""Names and layouts between Megatron-Core and Hugging Face, driven by the family's table of `WeightRule`s."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe2dense.checkpoint import mxfp4
from megatron_moe2dense.families import Dims, FamilySpec, WeightRule

_OUTPUT, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: its rule and the Hugging Face tensors it is made of, by global layer and expert number."""

    rule: WeightRule
    hf: tuple[str, ...]
    expert: int = 0


class WeightMapping:
    """Finds the entry of a local parameter name.

    Args:
        family, dims: of the model. first_layer, first_expert: global numbers of this rank's first layer and expert.
        present: the tensors of the checkpoint that is read, which tell its layout; None: the layout that is written.
    """

    def __init__(self, family: FamilySpec, dims: Dims, first_layer: int = 0, first_expert: int = 0, present: Container[str] | None = None):
        self._offsets = {"layer": first_layer, "expert": first_expert}
        self._tied = dims.tied_embeddings
        self._present = present
        assert family.megatron is not None, "ModelSpec.of takes families with a Megatron table"
        self._patterns = [(_pattern(name), rule) for rule in family.megatron for name in (rule.megatron, *rule.aliases)]
        self._embedding = next(rule for rule in family.megatron if rule.megatron == _EMBEDDING)

    def entry(self, name: str) -> Entry:
        """The rule and Hugging Face names for a Megatron parameter name; AssertionError when the family's table has a gap."""
        entries = [self._of(rule, match.groupdict()) for pattern, rule in self._patterns if (match := pattern.fullmatch(name))]
        assert entries, f"no Megatron rule for parameter {name!r}"
        present = self._present
        if present is None:
            return entries[0]
        return next((entry for entry in entries if all(tensor in present for tensor in entry.hf)), entries[0])

    def _of(self, rule: WeightRule, found: dict[str, str]) -> Entry:
        source = self._embedding if self._tied and rule.megatron == _OUTPUT else rule
        numbers = {"expert": 0, **{key: int(value) + self._offsets[key] for key, value in found.items()}}
        return Entry(rule, tuple(template.format(**numbers) for template in source.hf), numbers["expert"])

    def is_copy(self, name: str) -> bool:
        """True for the output layer of a tied model, which repeats the embedding."""
        return self._tied and name == _OUTPUT


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(text)


def join(kind: str, parts: Iterable[Tensor], kv_heads: int) -> Tensor:
    """Hugging Face tensors (whole, or one rank's rows with its share of `kv_heads`) to the Megatron tensor."""
    tensors = list(parts)
    if kind in ("plain", "vocab"):
        return tensors[0]
    if kind == "gate_up":
        return torch.cat(tensors)
    grouped = [tensor.reshape(kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(grouped, 1).flatten(0, 1)


def split(kind: str, tensor: Tensor, dims: Dims) -> list[Tensor]:
    """The inverse of `join` for a whole Megatron tensor."""
    if kind == "vocab":
        return [tensor[: dims.vocab_size]]
    if kind == "plain":
        return [tensor]
    if kind == "gate_up":
        return list(tensor.chunk(2))
    queries = dims.heads // dims.kv_heads * dims.head_dim
    grouped = tensor.reshape(dims.kv_heads, -1, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([queries, dims.head_dim, dims.head_dim], 1)]


def is_packed(rule: WeightRule) -> bool:
    """True when the stored tensors are not the matrices themselves, so that a rank can not read its rows alone."""
    return rule.packing != type(rule.packing)() or (rule.kind == "gate_up" and len(rule.hf) == 1)


def unpack(rule: WeightRule, stored: Sequence[Tensor], where: str) -> list[Tensor]:
    """What `join` takes, whole, from the stored tensors of one expert.

    Args:
        where: file and tensor, for the message.

    Raises:
        UserError: an MXFP4 exponent is NaN.
    """
    packing, tensors = rule.packing, list(stored)
    if packing.mxfp4:
        tensors = [mxfp4.decode(blocks, scales, where) for blocks, scales in zip(tensors[::2], tensors[1::2], strict=True)]
    if packing.transposed:
        tensors = [tensor.T for tensor in tensors]
    if rule.kind != "gate_up" or len(tensors) == 2:
        return tensors
    return [tensors[0][0::2], tensors[0][1::2]] if packing.interleaved else list(tensors[0].chunk(2))


def pack(rule: WeightRule, parts: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `unpack`; MXFP4 is never written."""
    packing, tensors = rule.packing, list(parts)
    assert not packing.mxfp4, "the first row of a table is a floating-point layout"
    if rule.kind == "gate_up" and len(rule.hf) == 1:
        tensors = [torch.stack(tensors, 1).flatten(0, 1) if packing.interleaved else torch.cat(tensors)]
    return [tensor.T for tensor in tensors] if packing.transposed else tensors
