"""Runs a model layer by layer: one stock decoder layer in memory at a time, hidden states of all windows carried over.

The attention, norms and dense layers are the stock transformers modules; the MoE block is ours, so that the experts run
once for both the statistics and the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.surgery.experts import MoeWeights, gating, load_moe
from megatron_moe2dense.surgery.source import MoeSource

# Called once per forward of a MoE layer with (layer number, x_TD, weights of the block); returns the block's output [T, D].
MoeForward = Callable[[int, torch.Tensor, MoeWeights], torch.Tensor]


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
    """A MoE checkpoint that runs one layer at a time.

    Args:
        source: the checkpoint. reader: open on it. compute: device, dtype, windows per forward.
    """

    def __init__(self, source: MoeSource, reader: CheckpointReader, compute: Compute):
        self._source, self._reader, self._compute = source, reader, compute
        config = AutoConfig.from_pretrained(source.index.directory)
        self._gating = gating(source, config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=compute.dtype)
        self._base: Any = model.eval().base_model
        self._layers = list(self._base.layers)
        self._recorders = [_Recorder(layer) for layer in self._layers]
        self._base.layers = nn.ModuleList(self._recorders)
        self._base.rotary_emb = type(self._base.rotary_emb)(config=config).to(compute.device)
        self._prefix = source.layer_prefix(0).removesuffix("layers.0.")

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        like = torch.empty(0, dtype=self._compute.dtype, device=self._compute.device)
        state = {name: self._reader.finite(prefix + name).to(like) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)

    @torch.no_grad()
    def run(self, windows_BS: np.ndarray, moe_forward: MoeForward) -> Iterator[list[torch.Tensor]]:
        """Yield the hidden states before layer 0 and after each layer: a list of [batch, S, D] on the CPU.

        The list is one object, changed in place from layer to layer.

        Raises:
            UserError: a tensor is missing or holds a NaN or infinite value.
        """
        hidden, arguments = self._embed(windows_BS)
        yield hidden
        for number, layer in enumerate(self._layers):
            self._load_layer(number, layer, moe_forward)
            for i, x_BSD in enumerate(hidden):
                y_BSD = layer(x_BSD.to(self._compute.device), **arguments[len(x_BSD)][number])
                hidden[i] = y_BSD.cpu()
            self._release(number, layer)
            yield hidden

    def _embed(self, windows_BS: np.ndarray) -> tuple[list[torch.Tensor], dict[int, list[dict[str, Any]]]]:
        """Hidden states before layer 0, and what the stock model hands to each layer, by batch size (masks, positions)."""
        for name in ("embed_tokens", "norm"):
            self._materialise(getattr(self._base, name), f"{self._prefix}{name}.")
        hidden, arguments = [], {}
        for start in range(0, len(windows_BS), self._compute.batch):
            tokens_BS = torch.from_numpy(windows_BS[start : start + self._compute.batch]).to(self._compute.device)
            self._base(input_ids=tokens_BS, use_cache=False)
            hidden.append(self._recorders[0].calls[0][0].cpu())
            arguments[len(tokens_BS)] = [recorder.calls.pop()[1] for recorder in self._recorders]
        self._base.embed_tokens.to("meta")
        return hidden, arguments

    def _load_layer(self, number: int, layer: Any, moe_forward: MoeForward) -> None:
        source = self._source
        if number in source.layers:
            like = torch.empty(0, dtype=self._compute.dtype, device=self._compute.device)
            weights = load_moe(source, self._reader, number, self._gating, like)
            setattr(layer, source.spec.module, _MoeBlock(number, weights, moe_forward, source.spec.returns_scores))
        self._materialise(layer, source.layer_prefix(number))

    def _release(self, number: int, layer: Any) -> None:
        layer.to("meta")
        if number in self._source.layers:
            setattr(layer, self._source.spec.module, nn.Identity())
