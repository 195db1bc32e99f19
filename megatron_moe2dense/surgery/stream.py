"""Runs a model layer by layer: one stock decoder layer at a time (and the next one's weights on their way), hidden states of all
windows carried over.

The attention, norms and dense layers are the stock transformers modules; the MoE block is ours, so that the experts run
once for both the statistics and the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.families import Dims
from megatron_moe2dense.surgery.dense_block import DenseBlock
from megatron_moe2dense.surgery.experts import MoeWeights, gating, load_moe
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.source import MoeSource

# Called once per forward of a MoE layer with (layer number, x_TD, weights of the block); returns the block's output [T, D].
MoeForward = Callable[[int, torch.Tensor, MoeWeights], torch.Tensor]


class StreamSource(Protocol):
    """What a checkpoint has to say of itself: its files, sizes, and what the names of a layer's tensors begin with."""

    @property
    def index(self) -> CheckpointIndex:
        """The opened files."""
        ...

    @property
    def dims(self) -> Dims:
        """Sizes."""
        ...

    def layer_prefix(self, layer: int) -> str:
        """What the names of all tensors of a layer begin with."""
        ...


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what the stock model calls it with, and passes the hidden states on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def forward(self, hidden_BSD: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls.append((hidden_BSD, arguments))
        return hidden_BSD


class _MoeBlock(nn.Module):
    """Our MoE block in the place of the stock one."""

    def __init__(self, layer: int, weights: MoeWeights, forward: MoeForward, returns_scores: bool):
        super().__init__()
        self._layer, self._weights, self._forward, self._returns_scores = layer, weights, forward, returns_scores

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        y_BSD = self._forward(self._layer, x_BSD.reshape(-1, x_BSD.shape[-1]), self._weights).view_as(x_BSD)
        return (y_BSD, None) if self._returns_scores else y_BSD  # decoder layers ignore the scores


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
        config = AutoConfig.from_pretrained(source.index.directory, trust_remote_code=False)
        self._moe = source if isinstance(source, MoeSource) else None
        self._gating = None if self._moe is None else gating(self._moe, config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=compute.dtype)
        self._base: Any = model.eval().base_model
        self._layers = list(self._base.layers)
        self._recorders = [_Recorder(layer) for layer in self._layers]
        self._base.layers = nn.ModuleList(self._recorders)
        self._base.rotary_emb = type(self._base.rotary_emb)(config=config).to(compute.device)
        self._prefix = source.layer_prefix(0).removesuffix("layers.0.")

    @property
    def layers(self) -> list[Any]:
        """The stock decoder layers, to hook into: the same objects in every run, weightless but for the one that runs."""
        return self._layers

    @torch.no_grad()
    def final_norm(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """What the LM head would see of hidden states after the last layer; once a run has begun."""
        return self._base.norm(x_BSD.to(self._compute.device))

    @torch.no_grad()
    def run(
        self, windows_BS: np.ndarray, moe_forward: MoeForward | None, place: HiddenPlace | None = None, start: int = 0
    ) -> Iterator[HiddenStates]:
        """Yield the hidden states before layer `start` and after each layer from there on; the next layer's weights are read meanwhile.

        Args:
            moe_forward: None for a model without experts.
            place: where the states live (None: in memory). start: the layer to go on at, from the file of an earlier run.

        The yielded object is always the same one, advanced from layer to layer.

        Raises:
            UserError: a tensor is missing or holds a NaN or infinite value; a full disk.
        """
        hidden, arguments = self._embed(windows_BS, place or HiddenPlace(), start)
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            weights = pool.submit(self._read_layer, start)
            yield hidden
            for number, layer in list(enumerate(self._layers))[start:]:
                self._assemble(number, layer, weights.result(), moe_forward)
                weights = pool.submit(self._read_layer, number + 1)
                for i, x_BSD in enumerate(hidden):
                    hidden.put(i, layer(x_BSD.to(self._compute.device), **arguments[len(x_BSD)][number]))
                self._release(number, layer)
                hidden.advance(number + 1)
                yield hidden

    def _embed(self, windows_BS: np.ndarray, place: HiddenPlace, start: int) -> tuple[HiddenStates, dict[int, list[dict[str, Any]]]]:
        """Hidden states before layer `start`, and what the stock model hands to each layer, by batch size (masks, positions)."""
        batch = self._compute.batch
        for name in ("embed_tokens", "norm"):
            module = getattr(self._base, name)
            module.load_state_dict(self._read(f"{self._prefix}{name}.", list(module.state_dict())), assign=True)
        shape = (*windows_BS.shape, self._source.dims.hidden_size)
        hidden, arguments = HiddenStates(shape, self._compute.dtype, batch, place, start), {}
        for i in range(len(hidden)):
            tokens_BS = torch.from_numpy(windows_BS[i * batch : (i + 1) * batch]).to(self._compute.device)
            if start and len(tokens_BS) in arguments:
                continue
            self._base(input_ids=tokens_BS, use_cache=False)
            calls = [recorder.calls.pop() for recorder in self._recorders]
            arguments[len(tokens_BS)] = [call[1] for call in calls]
            if not start:
                hidden.put(i, calls[0][0])
        if not start:
            hidden.advance(0)
        self._base.embed_tokens.to("meta")
        return hidden, arguments

    def _read(self, prefix: str, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self._reader.finite(prefix + name).to(self._like) for name in names}

    def _read_layer(self, number: int) -> tuple[dict[str, torch.Tensor], MoeWeights | None]:
        """Weights of a layer on the compute device: of the stock modules, and of the MoE block; nothing beyond the last layer."""
        moe = self._moe
        if number == len(self._layers):
            return {}, None
        names, weights = list(self._layers[number].state_dict()), None
        if moe is not None and self._gating is not None and number in moe.layers:
            names = [name for name in names if not name.startswith(moe.spec.module + ".")]
            weights = load_moe(moe, self._reader, number, self._gating, self._like)
        return self._read(self._source.layer_prefix(number), names), weights

    def _assemble(
        self, number: int, layer: Any, read: tuple[dict[str, torch.Tensor], MoeWeights | None], forward: MoeForward | None
    ) -> None:
        state, weights = read
        if self._moe is not None and weights is not None:
            assert forward is not None, "a MoE needs its forward"
            setattr(layer, self._moe.spec.module, _MoeBlock(number, weights, forward, self._moe.spec.returns_scores))
        layer.load_state_dict(state, assign=True)

    def _dense_block(self) -> DenseBlock:
        """For an FFN in the place of a MoE block."""
        assert self._moe is not None, "only a MoE has the place"
        assert self._gating is not None, "only a MoE has the place"
        return DenseBlock(self._gating, self._moe.spec.returns_scores)

    def _assemble_with(self, number: int, block: nn.Module | None) -> None:
        """The stock layer with its weights, read now; of a MoE layer with `block` in the place of the MoE block."""
        layer, names = self._layers[number], list(self._layers[number].state_dict())
        if block is not None:
            assert self._moe is not None, "a dense model's layers are whole"
            names = [name for name in names if not name.startswith(self._moe.spec.module + ".")]
            setattr(layer, self._moe.spec.module, block)
        layer.load_state_dict(self._read(self._source.layer_prefix(number), names), assign=True)

    def _release(self, number: int, layer: Any) -> None:
        layer.to("meta")
        if self._moe is not None and number in self._moe.layers:
            setattr(layer, self._moe.spec.module, nn.Identity())
