"""Which weights of the student are trained (`train.parts`); the others keep their values, and have neither gradient nor optimizer state."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.families.spec import FfnPart
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import Entry, WeightMapping
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec
from megatron_moe2dense.trainer.outline import Weight, outline
from megatron_moe2dense.trainer.weights import named_of_rank

_HEAD = "output_layer.weight"


class Parts:
    """What is trained of a model.

    Args:
        parts: "all", "ffn", "ffn+norms+head", or patterns (fnmatch) of names of the stock class.

    Raises:
        UserError: a pattern that matches no name; or some of the tensors alone that Megatron-Core keeps in one.
    """

    def __init__(self, parts: str | Sequence[str], spec: ModelSpec):
        self._parts, self._mapping = parts, WeightMapping(spec)
        self._tied = self._mapping.entry(_HEAD).names if spec.dims.tied_embeddings else ()
        if not isinstance(parts, str):
            self._require(list(_entries(spec, self._mapping)), parts)

    @property
    def are_all(self) -> bool:
        """Whether nothing is frozen."""
        return self._parts == "all"

    def trains(self, entry: Entry) -> bool:
        """Whether a parameter is trained."""
        if isinstance(self._parts, str):
            ffn = isinstance(entry.rule.made_of, FfnPart)
            return self.are_all or ffn or ("norms" in self._parts and self._is_norm_or_head(entry))
        return any(fnmatchcase(entry.names[0], pattern) for pattern in self._parts)

    def trains_weight(self, weight: Weight, layer: int) -> bool:
        """As `trains`, of a weight of a model's outline that stands in this layer."""
        return self.trains(_in_layer(self._mapping, weight, layer))

    def _is_norm_or_head(self, entry: Entry) -> bool:
        name = entry.rule.megatron
        return "layernorm" in name or name == _HEAD or entry.names == self._tied

    def _require(self, entries: list[Entry], patterns: Sequence[str]) -> None:
        names = list(dict.fromkeys(name for entry in entries for name in entry.names))
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = did_you_mean(pattern, names) or f"the student has {names[0]}, ..., {names[-1]}"
                raise UserError(f"train.parts: {pattern} matches no weight of the student", "patterns of its weights' names", close)
        for entry in entries:
            chosen = [name for name in entry.names if any(fnmatchcase(name, pattern) for pattern in patterns)]
            if chosen and len(chosen) < len(entry.names):
                raise UserError(
                    f"train.parts: {chosen[0]} without {next(name for name in entry.names if name not in chosen)}",
                    "both or neither: Megatron-Core keeps them in one tensor",
                    "widen the pattern, or leave it out",
                )


def require(parts: str | Sequence[str], spec: ModelSpec) -> str:
    """What is trained, in words; UserError as of `Parts`."""
    chosen = Parts(parts, spec)
    if chosen.are_all:
        return "all"
    entries = list(_entries(spec, WeightMapping(spec)))
    return f"{sum(map(chosen.trains, entries))} of {len(entries)} parameters"


def _entries(spec: ModelSpec, mapping: WeightMapping) -> Iterator[Entry]:
    whole, moe = outline(spec), set(spec.moe_layers)
    yield mapping.entry(whole.embedding.name)
    for layer in range(spec.dims.layers):
        for weight in whole.layers[layer in moe]:
            yield _in_layer(mapping, weight, layer)
    yield from (mapping.entry(weight.name) for weight in whole.last)


def _in_layer(mapping: WeightMapping, weight: Weight, layer: int) -> Entry:
    """Of a weight of the outline, which has one layer of each kind, as it stands in this one."""
    return mapping.entry(re.sub(r"\.layers\.\d+\.", f".layers.{layer}.", weight.name))


def frozen(parts: str | Sequence[str], spec: ModelSpec) -> tuple[int, int]:
    """Elements that are not trained, without padding, and those of the layers' matrices among them."""
    chosen, mapping = Parts(parts, spec), WeightMapping(spec)
    if chosen.are_all:
        return 0, 0
    whole, moe = outline(spec), set(spec.moe_layers)
    layers = [(weight, layer) for layer in range(spec.dims.layers) for weight in whole.layers[layer in moe]]
    ends = {mapping.entry(weight.name).names: weight for weight in (whole.embedding, *whole.last)}
    still = [weight for weight, layer in (*layers, *((weight, 0) for weight in ends.values())) if not chosen.trains_weight(weight, layer)]
    tables = sum(weight.rule.kind == "vocab" for weight in still) * spec.dims.vocab_size * spec.dims.hidden_size
    elements = sum(math.prod(weight.shape) for weight in still if weight.rule.kind != "vocab")
    return tables + elements, sum(weight.matrix for weight in still if weight.rule.kind != "vocab")


def freeze(chunks: Sequence[HeadlessGPT], parts: str | Sequence[str], spec: ModelSpec, groups: Groups) -> None:
    """Take all that is not trained from autograd, before gradients get their buffers.

    A layer that is computed again in the backward pass asks for gradients of its input (Megatron-Core's checkpoints, all versions): with a
    frozen embedding there are none to begin with, so its output gets some.
    """
    chosen = Parts(parts, spec)
    if chosen.are_all:
        return
    for _, _, tensor, entry in named_of_rank(chunks, spec, groups):
        if tensor.requires_grad:
            tensor.requires_grad_(chosen.trains(entry))
    for chunk in chunks:
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            embedding: Any = chunk.embedding
            if not embedding.word_embeddings.weight.requires_grad:
                embedding.register_forward_hook(lambda _module, _arguments, output: output.requires_grad_())
