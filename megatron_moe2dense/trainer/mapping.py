"""Which tensors of the stock class a Megatron-Core parameter is made of, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe2dense.families import Dims, WeightRule
from megatron_moe2dense.families.ffn import FfnPlace
from megatron_moe2dense.families.megatron import COMMON_RULES
from megatron_moe2dense.families.spec import FfnPart, Part
from megatron_moe2dense.trainer.model import ModelSpec

_OUTPUT, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter.

    names: the tensors of the stock class that it is made of. ffn: where they stand, if they are part of an FFN. expert: the global number
    of the one it is of, where these tensors hold all experts.
    """

    rule: WeightRule
    names: tuple[str, ...]
    ffn: FfnPlace | None = None
    expert: int | None = None

    @property
    def part(self) -> Part:
        """Which part of the FFN it is."""
        assert isinstance(self.rule.made_of, FfnPart), "it is part of one"
        return self.rule.made_of.part

    @property
    def is_expert(self) -> bool:
        """Of a routed expert."""
        return "{expert}" in self.rule.megatron


class WeightMapping:
    """Finds the entry of a local parameter name. first_layer, first_expert: global numbers of this rank's first layer and expert."""

    def __init__(self, spec: ModelSpec, first_layer: int = 0, first_expert: int = 0):
        self._stock = spec.stock
        self._offsets = {"layer": first_layer, "expert": first_expert}
        self._tied = spec.dims.tied_embeddings
        rules = (*spec.family.attention, *COMMON_RULES)
        self._patterns = [(_pattern(name), rule) for rule in rules for name in (rule.megatron, *rule.aliases)]
        self._embedding = next(rule for rule in rules if rule.megatron == _EMBEDDING).made_of

    def rule(self, name: str) -> tuple[WeightRule, dict[str, int]]:
        """The rule of a Megatron parameter name, and the local numbers in it; AssertionError when the family's table has a gap."""
        for pattern, rule in self._patterns:
            if (match := pattern.fullmatch(name)) is not None:
                return rule, {key: int(value) for key, value in match.groupdict().items()}
        raise AssertionError(f"no Megatron rule for parameter {name!r}")

    def entry(self, name: str) -> Entry:
        """The entry of a Megatron parameter name; AssertionError when the family's table has a gap."""
        rule, numbers = self.rule(name)
        layer, expert = (numbers.get(key, -offset) + offset for key, offset in self._offsets.items())
        if isinstance(rule.made_of, FfnPart):
            place = self._ffn(rule.made_of, layer)
            names = tuple(self._stock.in_model(layer, each) for each in place.names_of(rule.made_of.part))
            return Entry(rule, names, place, expert if place.experts else None)
        templates = self._embedding if self._tied and rule.megatron == _OUTPUT else rule.made_of
        assert not isinstance(templates, FfnPart), "an embedding is none"
        moe = self._stock.moe.get(layer)
        modules = {} if moe is None else {"router": moe.router, "shared_gate": moe.shared_gate}
        return Entry(rule, tuple(template.format(layer=layer, **modules) for template in templates))

    def _ffn(self, part: FfnPart, layer: int) -> FfnPlace:
        """Where it stands in the layer; the FFN of a layer that the model is built dense in may be the only expert of the class."""
        moe = self._stock.moe.get(layer)
        if moe is None:
            return next(iter(self._stock.ffns(layer).values()))
        return moe.shared[0] if part.of == "shared" else moe.experts

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


def splits_heads(kind: str, dims: Dims, ranks: int) -> bool:
    """With fewer KV heads than tensor-parallel ranks Megatron-Core cuts the joined projection anywhere, and gathers its outputs."""
    return kind == "qkv" and dims.kv_heads < ranks


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
