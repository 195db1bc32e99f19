"""The dense form of a MoE class: a stock class and config in which an FFN in the place of the experts is exact, found by trying.

Tried in this order: a dense sibling (table.py), the class itself with all layers dense, the class itself with one expert whose gate is
constant, or with two where its router does not run with one. Each is built on meta and has to take every tensor outside the MoE blocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.alike import unlike
from megatron_moe2dense.families.candidates import candidates, set_key, width_keys, width_of
from megatron_moe2dense.families.ffn import FfnPlace
from megatron_moe2dense.families.probe import StandIn, first_of, random_tokens, real, run_block
from megatron_moe2dense.families.stock import MoePlace, Stock
from megatron_moe2dense.families.table import exception_of
from megatron_moe2dense.families.widths import GROUPED_PRODUCTS, RUNS_EVERYWHERE, rounded_up

# What a published config.json says of its own files: how they are coded, which module beside them reads them, and GPT-OSS' second name for
# num_experts_per_tok, which the stock class does not read.
_OF_SOURCE_FILES = ("quantization_config", "auto_map", "experts_per_token")


@dataclass(frozen=True)
class Slot:
    """A place for neurons in a layer of the dense class. expert: which of a stack. factor: what its output is multiplied by there.
    key, times: the config key that is its width, and how many times."""

    place: FfnPlace
    expert: int | None
    factor: float
    key: str
    times: int = 1


@dataclass(frozen=True)
class Dense:
    """The dense form for some number of neurons.

    Attributes:
        stock: the class with its final config. slots: of each layer whose FFN is written, MoE layer or dense one that has to be padded.
        added: tensors that the MoE lacks, by name in the model.
    """

    stock: Stock
    slots: dict[int, tuple[Slot, ...]]
    added: dict[str, torch.Tensor]

    def config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json: every key that the class has, none left to a default that another reader may not share. source: the
        MoE's, for the type of its numbers."""
        whole = self.stock.model.config
        written = {name: value for name, value in whole.to_diff_dict().items() if name not in _OF_SOURCE_FILES}
        inner = written.get("text_config")
        if isinstance(inner, dict):
            written["text_config"] = {name: value for name, value in inner.items() if name not in _OF_SOURCE_FILES}
        written["architectures"] = [type(self.stock.model).__name__]
        dtype = source.get("dtype", source.get("torch_dtype"))
        return {**written, "model_type": whole.model_type, **({} if dtype is None else {"dtype": dtype})}

    def width(self, layer: int) -> int:
        """Neurons that the layer holds."""
        shapes = self.stock.layer_shapes[layer]
        return sum(slot.place.sizes(shapes)[0] for slot in self.slots[layer])

    def parameters_of_neuron(self, layer: int) -> int:
        """Of its FFN."""
        place, shapes = self.slots[layer][0].place, self.stock.layer_shapes[layer]
        whole = sum(math.prod(shapes[name]) for name in place.names if name != place.down_bias)
        return whole // (place.sizes(shapes)[0] * max(1, place.experts))


class DenseForm:
    """The dense form of a MoE class, whatever its width.

    Args:
        source: the MoE's class. alone: without what is around the language model.

    Raises:
        UserError: none is exact.
    """

    def __init__(self, source: Stock, alone: bool = False):
        self.source = source
        self.alone = alone and source.wrapped
        self.exception = exception_of(source.name)
        require_known(source)
        reasons = []
        for kind, config, experts in candidates(source, self.exception, self.alone):
            reason = self._try(kind, config, experts)
            if reason is None:
                return
            reasons.append(f"{kind}: {reason}")
        raise _refusal(source, "; ".join(reasons))

    def _try(self, kind: str, config: Callable[[], Any], experts: int) -> str | None:
        """Take this form if it holds all that is no MoE block, and its block runs; else why not."""
        for name in [name for name, value in vars(DenseForm).items() if isinstance(value, cached_property)]:
            vars(self).pop(name, None)  # what was found of the form before
        try:
            found = Stock(config())
        except Exception as error:
            return f"{type(error).__name__} {error}".splitlines()[0]
        if len(found.layers) != len(self.source.layers):
            return "other layers"
        if any(moe.experts.experts > max(1, experts) for moe in found.moe.values()):
            return "all experts are still there"
        self.kind, self._base = kind, found
        try:
            self._places = {layer: self._new_places(layer) for layer in self.source.moe}
            left_out = self._left_out()
            for layer in range(len(found.layers)) if left_out is None else ():
                self._values(found, layer)
            if left_out is None and experts:
                self.slots(next(iter(self.source.moe)))
        except (ValueError, RuntimeError) as error:
            return str(error)
        return left_out or unlike(self.source, found, self.exception.unless_sliding)

    def _new_places(self, layer: int) -> tuple[FfnPlace, ...]:
        before, after = self.source.ffns(layer), self._base.ffns(layer)
        if self.exception.into is not None:
            return (after[self.exception.into],)
        moe = self.source.moe[layer]
        new = [place for path, place in after.items() if path not in before or path == moe.experts.path]
        if not new:
            raise ValueError(f"no FFN in the place of the experts of layer {layer}")
        return tuple(new)

    @cached_property
    def has_shared(self) -> bool:
        """Whether the dense class has an FFN where the MoE's shared experts stand."""
        first = next(iter(self.source.moe.values()))
        return bool(first.shared) and first.shared[0].path in self._base.ffns(first.layer)

    @cached_property
    def absorbs_shared(self) -> bool:
        """Whether the shared experts' neurons are written with the others, into new places or into their own made wider."""
        first = next(iter(self.source.moe.values()))
        return bool(first.shared) and (
            not self.has_shared or any(place.path == first.shared[0].path for place in self._written(first.layer))
        )

    def _left_out(self) -> str | None:
        """The first tensor outside the MoE blocks that the form has no place for, or has another one for."""
        source, base = self.source.shapes, self._base.shapes
        gone = self.replaced | self.of_dense_layers
        for name, shape in source.items():
            taken = None if name in gone else self.takes(name)
            if taken is not None and base.get(taken) not in (shape, None):
                return f"{taken} is {list(base[taken])} instead of {list(shape)}"
            if taken is not None and taken not in base:
                return f"no {taken}"
        return None

    def takes(self, name: str) -> str | None:
        """The name in the dense class of a tensor of the MoE's class; None for what is around a language model that is wanted alone."""
        if not self.alone:
            return name
        if name.startswith(self.source.base_prefix):
            return self._base.base_prefix + name.removeprefix(self.source.base_prefix)
        head = name.rpartition("lm_head.")
        return f"{head[1]}{head[2]}" if head[1] else None

    @cached_property
    def of_dense_layers(self) -> set[str]:
        """Tensors of the FFNs of layers without experts, which the form may make wider."""
        layers = [layer for layer in range(len(self.source.layers)) if layer not in self.source.moe]
        found = {layer: self.source.ffns(layer) for layer in layers}
        same = [(layer, place) for layer in layers for path, place in found[layer].items() if path in self._base.ffns(layer)]
        return {self.source.in_model(layer, name) for layer, place in same for name in place.names}

    def dense_place(self, layer: int) -> FfnPlace:
        """The FFN of a layer without experts, in the MoE's class."""
        found = [place for path, place in self.source.ffns(layer).items() if path in self._base.ffns(layer)]
        if not found:
            raise ValueError(f"layer {layer} has no FFN")
        return found[0]

    @cached_property
    def replaced(self) -> set[str]:
        """Tensors of the MoE class that the dense FFN takes the place of, by name in the model."""
        found = set()
        for layer, moe in self.source.moe.items():
            inside = [*moe.experts.names, *self._router_names(layer, moe)]
            if not self.has_shared:
                inside += [name for shared in moe.shared for name in shared.names]
                inside += [moe.shared_gate] if moe.shared_gate is not None else []
            else:
                inside += [name for place in self._written(layer) for name in place.names if name in self.source.layer_shapes[layer]]
            found |= {self.source.in_model(layer, name) for name in inside}
            if self.exception.into is not None:
                found |= {self.source.in_model(layer, name) for name in self._places[layer][0].names}
        return found

    def _router_names(self, layer: int, moe: MoePlace) -> list[str]:
        """Of the router and what else of the block belongs to routing: what is no module with a product of its own."""
        shapes, kept = self.source.layer_shapes[layer], self._base.layer_shapes[layer]
        inside = [name for name in shapes if name.startswith(f"{moe.router}.")]
        if moe.block:
            own = [name for name in shapes if name.startswith(f"{moe.block}.") and "." not in name.removeprefix(f"{moe.block}.")]
            inside += own
        return [name for name in inside if kept.get(name) != shapes[name]]

    @cached_property
    def _keys(self) -> dict[tuple[int, str], tuple[str, int]]:
        return width_keys(self._base)

    def _written(self, layer: int) -> list[FfnPlace]:
        """Of a MoE layer: its new FFN, and what shares the width key with it in that layer."""
        places = list(self._places[layer])
        keys = {self._keys[layer, place.path][0] for place in places}
        same = [place for path, place in self._base.ffns(layer).items() if self._keys.get((layer, path), ("", 1))[0] in keys]
        return places + [place for place in same if place not in places]

    def slots(self, layer: int) -> tuple[Slot, ...]:
        """Of a MoE layer."""
        found = []
        for place in self._written(layer):
            factors = self._factors(layer, place)
            key, times = self._keys[layer, place.path]
            found += [Slot(place, expert if place.experts else None, factor, key, times) for expert, factor in enumerate(factors)]
        return tuple(found)

    def _factors(self, layer: int, place: FfnPlace) -> list[float]:
        """What the block of the dense class multiplies each expert of a stack, or an FFN, by."""
        if place.experts == 0 and not self._base.moe.get(layer):
            return [1.0]
        return _constant_factors(self._base, self._base.moe[layer], place, self._values(self._base, layer))

    def _values(self, stock: Stock, layer: int) -> dict[str, torch.Tensor]:
        """Tensors of a layer that are neither the source's nor of a slot, by name in the layer: zero, or what the table says.

        Raises:
            ValueError: one that zeros would not leave without effect.
        """
        before, after = self.source.layer_shapes[layer], stock.layer_shapes[layer]
        moe = self.source.moe.get(layer)
        made = {name for place in self._written(layer) for name in place.names} if moe is not None else set()
        inside = () if moe is None else (f"{moe.router}.", f"{moe.block}." if moe.block else f"{moe.router}.")
        found = {}
        for name, shape in after.items():
            if name in made or (name in before and self.source.in_model(layer, name) not in self.replaced):
                continue
            given = next((value for end, value in self.exception.values.items() if name.endswith(end)), None)
            if given is None and not name.startswith(inside) and not name.endswith(".bias"):
                raise ValueError(f"layer {layer} lacks {name}")
            value = torch.zeros(shape) if given is None else torch.tensor(given).reshape(shape)
            found[name] = value.to(stock.integers.get(stock.in_model(layer, name), torch.float32))
        return found

    def widths(self, neurons: int, multiple: int = RUNS_EVERYWHERE) -> dict[str, int]:
        """The width of every FFN that is written, by its config key, with room for `neurons` in every MoE layer and for those of dense
        layers that share a key. multiple: what each is one of."""
        found: dict[str, int] = {}
        for layer, each in self._moe_slots.items():
            stacked = any(slot.place.experts for slot in each)
            rows = math.lcm(multiple, GROUPED_PRODUCTS) if stacked else multiple
            width = rounded_up(math.ceil(self.filled(layer, neurons) / sum(slot.times for slot in each)), rows)
            found[each[0].key] = max(found.get(each[0].key, 0), width)
        for layer, slot in self._dense_slots(found).items():
            width = width_of(self.source, layer, self.source.ffns(layer)[slot.place.path])
            found[slot.key] = max(found[slot.key], rounded_up(math.ceil(width / slot.times), multiple))
        return found

    @cached_property
    def _moe_slots(self) -> dict[int, tuple[Slot, ...]]:
        return {layer: self.slots(layer) for layer in self.source.moe}

    def _dense_slots(self, keys: Collection[str]) -> dict[int, Slot]:
        """The FFNs of layers without experts whose width is one of these config keys."""
        found = {}
        for layer in range(len(self.source.layers)):
            for path, place in self._base.ffns(layer).items() if layer not in self.source.moe else ():
                key, times = self._keys.get((layer, path), ("", 1))
                if key in keys and path in self.source.ffns(layer):
                    found[layer] = Slot(place, None, 1.0, key, times)
        return found

    @cache  # noqa: B019 - one form a source
    def of(self, neurons: int, multiple: int = RUNS_EVERYWHERE) -> Dense:
        """With room for `neurons` in every MoE layer. multiple: what the width of each FFN that is written is one of."""
        widths = self.widths(neurons, multiple)
        dense_layers = {layer: (slot,) for layer, slot in self._dense_slots(widths).items()}
        config = copy.deepcopy(self._base.config)
        for key, width in widths.items():
            set_key(config, key, width)
        stock = Stock(self._base.around(config))
        layers = range(len(stock.layers))
        added = {stock.in_model(layer, name): value for layer in layers for name, value in self._values(stock, layer).items()}
        return Dense(stock, {**self._moe_slots, **dense_layers}, added)

    def filled(self, layer: int, neurons: int) -> int:
        """Of the neurons of a layer whose FFN is written, those that are not zero, with `neurons` in a MoE layer."""
        if layer not in self.source.moe:
            return width_of(self.source, layer, self.dense_place(layer))
        return neurons + (0 if self.exception.into is None else self._kept_width(layer))

    def _kept_width(self, layer: int) -> int:
        """Neurons of the source's own FFN that takes the new ones."""
        return width_of(self.source, layer, self.source.ffns(layer)[str(self.exception.into)])


def has_experts(stock: Stock) -> bool:
    """Whether a class is a MoE, one that is refused too."""
    return bool(stock.moe or exception_of(stock.name).refused)


def require_known(source: Stock) -> None:
    """UserError for a class whose experts can not become one FFN, or have not been found."""
    refused = exception_of(source.name).refused
    if refused or not source.moe:
        raise _refusal(source, refused or "it has no layer of experts that could be found")
    if (more := _beside_matrices(source)) is not None:
        raise _refusal(source, f"its experts are no plain FFNs: they hold {more} beside their matrices")


def _beside_matrices(source: Stock) -> str | None:
    """A parameter of the experts that no role of an FFN is known for."""
    for layer, moe in source.moe.items():
        inside = [name for name in source.layer_shapes[layer] if name.startswith(f"{moe.experts.path}.")]
        if more := [name for name in inside if name not in moe.experts.names]:
            return source.in_model(layer, more[0])
    return None


def _refusal(source: Stock, why: str) -> UserError:
    return UserError(f"{source.name}: {why}", "a MoE class with an exact dense form in stock transformers", "docs/families.md lists them")


@torch.no_grad()
def _constant_factors(stock: Stock, moe: MoePlace, place: FfnPlace, values: dict[str, torch.Tensor]) -> list[float]:
    """The factor of each expert, or of a shared FFN, in a block of the dense class; ValueError where it is not constant."""
    layer, stand_in = stock.layers[moe.layer], StandIn()
    if not moe.block:
        router = real(layer.get_submodule(moe.router))
        _fill(router, moe.router, values)
        return _gates(router(random_tokens(stock)[0]), place.experts)
    block = real(layer.get_submodule(moe.block), layer.get_submodule(moe.called), stand_in)
    _fill(block, moe.block, values)
    x = random_tokens(stock)
    nothing = first_of(run_block(block, x))
    if not place.experts:
        own = block.get_submodule(place.path.removeprefix(f"{moe.block}."))(x)
        return [_ratio(nothing, own)]
    gates = _gates(stand_in.calls[-1][1:], place.experts)
    stand_in.value = torch.randn_like(stand_in.calls[-1][0])
    both = first_of(run_block(block, x))
    factor = _ratio((both - nothing).reshape(stand_in.value.shape), stand_in.value) if both.shape[-1] == stand_in.value.shape[-1] else 1.0
    return [gate * factor for gate in gates]


def _fill(module: nn.Module, path: str, values: dict[str, torch.Tensor]) -> None:
    state = module.state_dict()
    for name, value in values.items():
        inner = name.removeprefix(f"{path}.")
        if name.startswith(f"{path}.") and inner in state:
            state[inner].copy_(value)


def _gates(call: Any, experts: int) -> list[float]:
    tensors = [item for item in call if torch.is_tensor(item)]
    indices = next(item for item in tensors if not item.is_floating_point())
    weights = next(item for item in tensors if item.is_floating_point() and item.shape == indices.shape)
    found = torch.zeros(*indices.shape[:-1], experts).scatter_add_(-1, indices, weights.float()).reshape(-1, experts)
    if not (found - found[:1]).abs().max() < 1e-6:
        raise ValueError("gates that are not constant")
    return [round(float(gate), 7) for gate in found[0]]


def _ratio(found: torch.Tensor, of: torch.Tensor) -> float:
    """a where found = a of; 1 where it is none, as behind a norm: the proof of the whole block judges then."""
    ratio = float((found * of).sum() / (of * of).sum())
    return round(ratio, 6) if (found - ratio * of).norm() <= 1e-5 * found.norm() else 1.0
