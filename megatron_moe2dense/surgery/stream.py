"""Runs a model layer by layer: one stock decoder layer at a time (and the next one's weights on their way), hidden states of all
windows carried over.

Everything is the stock transformers code, its routers and shared experts too. Only the experts run here, so that they run once for both
the statistics and the layer's output; the stock block calls them with the tokens, the experts of each and their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.disk import Disk
from megatron_moe2dense.families.probe import routes_in
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.surgery.dense_block import DenseBlock
from megatron_moe2dense.surgery.experts import Experts, load_experts
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.lockstep import Lockstep
from megatron_moe2dense.surgery.seam import MoeWatcher, Seam
from megatron_moe2dense.surgery.source import MoeSource

_PROBE = 8  # tokens


class StreamSource(Protocol):
    """What a checkpoint has to say of itself: its files."""

    @property
    def index(self) -> CheckpointIndex:
        """The opened files."""
        ...


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what the stock model calls it with, and passes the hidden states on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # no submodule
        self.shift = 0.0
        self.calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        """What the stock model asks of a layer, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer, name)

    def forward(self, hidden_BSD: torch.Tensor, *positional: Any, **arguments: Any) -> torch.Tensor:
        self.calls.append((hidden_BSD, positional, arguments))
        return hidden_BSD + self.shift if self.shift else hidden_BSD


@dataclass(frozen=True)
class Call:
    """What the stock model hands to a layer beside the hidden states."""

    positional: tuple[Any, ...]
    arguments: dict[str, Any]

    def run(self, layer: nn.Module, x_BSD: torch.Tensor) -> torch.Tensor:
        """The layer's hidden states."""
        output = layer(x_BSD, *self.positional, **self.arguments)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Compute:
    """Where and in which type the model runs; batch: windows of one forward pass."""

    device: torch.device
    dtype: torch.dtype
    batch: int


class StreamedModel:
    """A checkpoint that runs one layer at a time.

    Args:
        source: the checkpoint; of a MoE a `MoeSource`. reader: open on it. compute: device, dtype, windows per forward.
    """

    def __init__(self, source: StreamSource, reader: CheckpointReader, compute: Compute):
        self._source, self._reader, self._compute = source, reader, compute
        self._like = torch.empty(0, dtype=compute.dtype, device=compute.device)
        self._moe = source if isinstance(source, MoeSource) else None
        self._stock = Stock.read(source.index.directory, compute.dtype)
        values = Values(source.index) if self._moe is None else self._moe.values
        self._disk = Disk(self._stock, values.shapes) if self._moe is None else self._moe.disk
        self._tensor = values.reader(reader) if self._moe is None else self._moe.reader(reader)
        self._in_float32, self._integers = self._routers_in_float32(), self._stock.integers  # asked while the layers are in their place
        self._base: Any = self._stock.base
        self._layers = list(self._stock.layers)
        self._recorders = [_Recorder(layer) for layer in self._layers]
        self._stock.put(nn.ModuleList(self._recorders))
        moe = {} if self._moe is None else self._moe.stock.moe
        self._seams = {number: Seam(self._layers[number], self._moe, number) for number in moe if self._moe is not None}

    def _routers_in_float32(self) -> tuple[str, ...]:
        """What the names of routers' parameters begin with, where the class computes them in float32 whatever the compute type."""
        moe = {} if self._moe is None else self._moe.stock.moe
        if self._compute.dtype != torch.float64 or not moe or routes_in(self._stock, moe[max(moe)], torch.float64):
            return ()
        return tuple(self._stock.in_model(number, f"{place.router}.") for number, place in moe.items())

    @property
    def layers(self) -> list[Any]:
        """The stock decoder layers, to hook into: the same objects in every run, weightless but for the one that runs."""
        return self._layers

    @torch.no_grad()
    def final_norm(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """What the LM head would see of hidden states after the last layer; once a run has begun."""
        return self._norm(x_BSD.to(self._compute.device))

    @property
    def _norm(self) -> nn.Module:
        """The norm behind the last layer."""
        found = [name for name in ("norm", "norm_f", "final_layernorm", "embedding_norm") if hasattr(self._base, name)]
        if not found:
            raise UserError(
                f"{type(self._base).__name__} has no norm behind its layers that is known",
                "norm, norm_f, final_layernorm or embedding_norm",
                "use a model whose last norm has one of these names",
            )
        return getattr(self._base, found[0])

    @torch.no_grad()
    def run(
        self, windows_BS: np.ndarray, watcher: MoeWatcher | None, place: HiddenPlace | None = None, start: int = 0
    ) -> Iterator[HiddenStates]:
        """Yield the hidden states before layer `start` and after each layer from there on; the next layer's weights are read meanwhile.

        Args:
            watcher: sees what goes into and out of the experts; None for a model without any.
            place: where the states live (None: in memory). start: the layer to go on at, from the file of an earlier run.

        The yielded object is always the same one, advanced from layer to layer.

        Raises:
            UserError: a tensor is missing or holds a NaN or infinite value; a full disk.
        """
        self._load_outside()
        if self._hand_more(windows_BS):
            yield from self._in_lockstep(windows_BS, watcher, place or HiddenPlace(), start)
            return
        hidden, calls = self._embed(windows_BS, place or HiddenPlace(), start)
        yield hidden
        for number, layer in self._ready(start, lambda _number: watcher):
            for i, x_BSD in enumerate(hidden):
                hidden.put(i, calls[i][number].run(layer, x_BSD.to(self._compute.device)))
            self._release(number)
            hidden.advance(number + 1)
            yield hidden

    def _ready(self, start: int, watcher: Callable[[int], MoeWatcher | None]) -> Iterator[tuple[int, nn.Module]]:
        """Each layer from `start` on with its weights, and who watches it; the next one's are read meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            weights = pool.submit(self._read_layer, start)
            for number, layer in list(enumerate(self._layers))[start:]:
                state, experts = weights.result()
                self._load(layer, state)
                if experts is not None:
                    seen_by = watcher(number)
                    assert seen_by is not None, "a MoE needs a watcher"
                    self._seams[number].route(experts, seen_by)
                weights = pool.submit(self._read_layer, number + 1)
                yield number, layer

    def _in_lockstep(self, windows_BS: np.ndarray, watcher: MoeWatcher | None, place: HiddenPlace, start: int) -> Iterator[HiddenStates]:
        """As `run`. What layers hand to each other lives in memory alone: a run that was stopped goes through its layers again."""
        batch = self._compute.batch
        tokens = [
            torch.from_numpy(windows_BS[first : first + batch]).to(self._compute.device) for first in range(0, len(windows_BS), batch)
        ]
        self._stock.put(Lockstep.places(self._layers))
        with Lockstep(lambda tokens_BS: self._base(input_ids=tokens_BS, use_cache=False), tokens) as lockstep:
            hidden = HiddenStates((len(windows_BS), *lockstep.hidden(0).shape[1:]), self._compute.dtype, batch, place)
            for i in range(len(tokens)):
                hidden.put(i, lockstep.hidden(i))
            hidden.advance(0)
            if not start:
                yield hidden
            for number, layer in self._ready(0, lambda number: watcher if number >= start else MoeWatcher()):
                for i in range(len(tokens)):
                    hidden.put(i, lockstep.advance(i, layer))
                self._release(number)
                hidden.advance(number + 1)
                if number + 1 >= start:
                    yield hidden
        self._stock.put(nn.ModuleList(self._recorders))

    def _embed(self, windows_BS: np.ndarray, place: HiddenPlace, start: int) -> tuple[HiddenStates, list[list[Call]]]:
        """Hidden states before layer `start`, and what the stock model hands to each layer, by batch (masks, positions)."""
        batch = self._compute.batch
        self.require_alone(windows_BS)
        hidden, calls = None, []
        for first in range(0, len(windows_BS), batch):
            tokens_BS = torch.from_numpy(windows_BS[first : first + batch]).to(self._compute.device)
            self._base(input_ids=tokens_BS, use_cache=False)
            found = [recorder.calls.pop() for recorder in self._recorders]
            calls.append(_shared([Call(positional, arguments) for _, positional, arguments in found], calls))
            x_BSD = found[0][0]
            if hidden is None:
                shape = (len(windows_BS), *x_BSD.shape[1:])
                hidden = HiddenStates(shape, self._compute.dtype, batch, place, start)
            if not start:
                hidden.put(first // batch, x_BSD)
        assert hidden is not None, "there is text"
        if not start:
            hidden.advance(0)
        self._base.get_input_embeddings().to("meta")
        return hidden, calls

    def require_alone(self, windows_BS: np.ndarray) -> None:
        """UserError for a model whose layers hand more to each other than hidden states: one layer alone tells nothing of them."""
        self._load_outside()
        if self._hand_more(windows_BS):
            raise UserError(
                f"{self._source.index.directory}: layers of {self._stock.name} hand more to each other than hidden states",
                "for `sweep`, `auto` and a refit in sequential mode, a model whose layers run one by one",
                "convert a plan with refit.mode=parallel, or without a refit (docs/families.md)",
            )

    def _load_outside(self) -> None:
        """What comes before and behind the layers."""
        outside = [name for name in self._base.state_dict() if not name.startswith(self._stock.layers_in_base)]
        self._load(self._base, self._read(self._stock.base_prefix, outside))

    @torch.no_grad()
    def _hand_more(self, windows_BS: np.ndarray) -> bool:
        """Whether layers get anything from the ones before them beside hidden states: what they are called with, for two outputs."""
        tokens_BS = torch.from_numpy(np.repeat(windows_BS[:1, :_PROBE], 3, axis=0)).to(
            self._compute.device
        )  # three, which unpack as no pair
        seen = []
        for shift in (0.0, 1.0):
            for recorder in self._recorders:
                recorder.shift = shift
            try:
                self._base(input_ids=tokens_BS, use_cache=False)
            except (ValueError, TypeError):
                return True
            finally:
                seen.append([recorder.calls.pop()[1:] if recorder.calls else None for recorder in self._recorders])
                for recorder in self._recorders:
                    recorder.shift = 0.0
        return not _equal(*seen)

    def _read(self, prefix: str, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of the class as they compute: in the compute type, but for those that the class keeps in float32."""
        found = {}
        for name in names:
            whole = prefix + name
            if self._disk.names_of(whole):
                found[name] = self._disk.tensor(whole, self._tensor).to(self._compute.device, self._type_of(whole))
        return found

    def _type_of(self, name: str) -> torch.dtype:
        if name in self._integers:
            return self._integers[name]
        return torch.float32 if name.startswith(self._in_float32) else self._stock.keeps(name, self._compute.dtype)

    def _load(self, module: nn.Module, state: dict[str, torch.Tensor]) -> None:
        self._stock.make_buffers(module, self._compute.device)
        module.load_state_dict(state, assign=True, strict=False)

    def _read_layer(self, number: int) -> tuple[dict[str, torch.Tensor], Experts | None]:
        """Weights of a layer on the compute device: of the stock modules, and of the experts; nothing beyond the last layer."""
        if number == len(self._layers):
            return {}, None
        names, experts = list(self._layers[number].state_dict()), None
        if number in self._seams and self._moe is not None:
            names = [name for name in names if name not in self._moe.stock.moe[number].experts.names]
            experts = load_experts(self._moe, self._reader, number, self._like)
        return self._read(self._stock.in_model(number, ""), names), experts

    def _dense_block(self, number: int) -> DenseBlock:
        """For an FFN in the place of a MoE block."""
        assert self._moe is not None, "only a MoE has the place"
        return DenseBlock(self._moe.gating(number))

    def _assemble_with(self, number: int, block: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """The stock layer with its weights, read now; of a MoE layer with `block` in the place of the MoE block, or of its experts."""
        layer, names = self._layers[number], list(self._layers[number].state_dict())
        if block is not None:
            seam = self._seams[number]
            names = [name for name in names if not seam.replaces(name)]
            seam.put(block)
        self._load(layer, self._read(self._stock.in_model(number, ""), names))

    def _release(self, number: int) -> None:
        self._layers[number].to("meta")
        if number in self._seams:
            self._seams[number].restore()


def _equal(one: Any, other: Any) -> bool:
    """Of what layers are called with."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    return type(one) is type(other)


def _shared(calls: list[Call], before: list[list[Call]]) -> list[Call]:
    """The calls of a batch, with the objects of an earlier one where they are equal: masks and positions, mostly."""
    if not before:
        return calls
    known: dict[int, Any] = {}

    def same(new: Any, old: Any) -> Any:
        if id(new) not in known:
            known[id(new)] = _merged(new, old)
        return known[id(new)]

    merged = []
    for call, earlier in zip(calls, before[0], strict=True):
        positional = tuple(same(new, old) for new, old in zip(call.positional, earlier.positional, strict=True))
        merged.append(Call(positional, {name: same(new, earlier.arguments.get(name)) for name, new in call.arguments.items()}))
    return merged


def _merged(new: Any, old: Any) -> Any:
    if torch.is_tensor(new) and torch.is_tensor(old):
        return old if new.shape == old.shape and torch.equal(new, old) else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_merged(each, other) for each, other in zip(new, old, strict=True))
    return new
