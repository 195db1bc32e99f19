"""What each layer, channel, head and neuron of a dense model carries on calibration text, as float64 sums over tokens; and which of them
a smaller shape keeps (docs/method.md#the-dense-to-dense-baseline, after Minitron, arXiv 2407.14679)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.progress import Progress
from megatron_moe2dense.surgery.calibrate import Job, require_finite
from megatron_moe2dense.surgery.prune_dense.source import DenseSource, Shape
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.stream import Compute, StreamedModel

_CHUNK_TOKENS = 1024  # of temporaries in float64


@dataclass(frozen=True)
class KeptLayer:
    """What stays of layer `number` of the source, ascending: query heads, key and value heads, neurons."""

    number: int
    heads: np.ndarray
    kv_heads: np.ndarray
    neurons: np.ndarray


@dataclass(frozen=True)
class Kept:
    """What stays of the source, ascending: hidden channels, the same in every layer, and the layers."""

    channels_D: np.ndarray
    layers: tuple[KeptLayer, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain lists, for kept.json."""
        layers = [
            {"layer": kept.number, **{name: getattr(kept, name).tolist() for name in ("heads", "kv_heads", "neurons")}}
            for kept in self.layers
        ]
        return {"format": 1, "hidden_channels": self.channels_D.tolist(), "layers": layers}


class Importance:
    """Hooks on stock decoder layers that add up, until they are taken, over tokens:

    channels [D]: |output| of every norm of the layer. heads [H]: the L2 norm of each query head's output, before the output projection.
    neurons [F]: |act(gate) * up|. distance [1]: 1 - cos(input of the layer, its output).

    Args:
        layers: the decoder layers.
    """

    def __init__(self, source: DenseSource, layers: list[Any]):
        self._head_dim = source.dims.head_dim
        self._sums: dict[str, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda _layer, inputs, output: self._observe_layer(inputs[0], output))
            for tensor in source.present(number):
                name = tensor.name(number)
                module = layer.get_submodule(name.removeprefix(source.layer_prefix(number)).rpartition(".")[0])
                if name.endswith(".weight"):
                    self._hook(module, tensor.axes)

    def _hook(self, module: nn.Module, axes: str) -> None:
        if axes == "D":
            module.register_forward_hook(self._observe_output)
        elif axes == "DQ":
            module.register_forward_pre_hook(lambda _module, inputs: self._observe_heads(inputs[0]))
        elif axes == "DF":
            module.register_forward_pre_hook(lambda _module, inputs: self._add("neurons", inputs[0].flatten(0, -2).abs()))

    def _observe_output(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        self.observe_norm(output)

    def observe_norm(self, output: torch.Tensor) -> None:
        """Add the output of a norm, [..., D]."""
        self._add("channels", output.flatten(0, -2).abs())

    def _observe_heads(self, output: torch.Tensor) -> None:
        heads_THd = output.unflatten(-1, (-1, self._head_dim)).flatten(0, -3)
        self._add("heads", torch.linalg.vector_norm(heads_THd, dim=-1, dtype=torch.promote_types(output.dtype, torch.float32)))

    def _observe_layer(self, before: torch.Tensor, after: torch.Tensor) -> None:
        tokens = before.numel() // before.shape[-1]
        self._sums["tokens"] = self._sums.get("tokens", torch.zeros(1, dtype=torch.float64)) + tokens
        chunks = (tensor.flatten(0, -2).split(_CHUNK_TOKENS) for tensor in (before, after))
        for x_TD, y_TD in zip(*chunks, strict=True):
            x_TD, y_TD = x_TD.double(), y_TD.double()
            self._add("distance", 1 - torch.cosine_similarity(x_TD, y_TD, dim=-1)[:, None])

    def _add(self, name: str, value_TN: torch.Tensor) -> None:
        value_N = value_TN.sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + value_N if name in self._sums else value_N

    def take(self) -> LayerStats:
        """The sums since the last call."""
        stats = LayerStats({name: value.cpu().numpy() for name, value in self._sums.items()})
        self._sums = {}
        return stats


def measure(source: DenseSource, windows_BS: np.ndarray, compute: Compute, job: Job) -> dict[int, LayerStats]:
    """The sums of every layer, by its number, over the windows of all ranks; the final norm's channels under the number after the last.

    Args:
        windows_BS: the windows of this rank.

    Raises:
        UserError: hidden states that are not finite.
    """
    resume, count = job.resume, source.dims.layers
    sums = {layer: resume.sums(layer) for layer in range(resume.start)}
    with CheckpointReader(source.index) as reader, Progress("calibrate", "layer", count, done=resume.start, each=True) as shown:
        model = StreamedModel(source, reader, compute)
        importance = Importance(source, model.layers)
        for hidden in model.run(windows_BS, None, resume.place, resume.start):
            require_finite(hidden, source)
            if hidden.layer > resume.start:
                done = hidden.layer - 1
                sums[done] = LayerStats(job.ranks.sum(importance.take().sums))
                resume.finish_layer(done, sums[done], hidden)
                shown.reached(hidden.layer)
            if hidden.layer == count:
                for x_BSD in hidden:
                    importance.observe_norm(model.final_norm(x_BSD))
                sums[count] = LayerStats(job.ranks.sum(importance.take().sums))
    return sums


def choose(source: DenseSource, stats: Mapping[int, LayerStats], shape: Shape) -> Kept:
    """The most important parts of the source, as many as `shape` has; one shot. Ties go to the lower number.

    Channels are ranked by the sum of their means over all norms of the source. Query heads are ranked within their group; where groups go,
    those stay whose kept heads sum to the most (ours).
    """
    layers, own = range(source.dims.layers), source.shape
    tokens = stats[0].tokens
    channels_D = np.sum([stats[layer]["channels"] for layer in (*layers, len(layers))], axis=0) / tokens
    distances = np.array([stats[layer]["distance"][0] for layer in layers]) / tokens
    kept = []
    for layer in best(distances, shape.num_hidden_layers):
        heads_GH = stats[int(layer)]["heads"].reshape(own.num_key_value_heads, own.heads_per_group)
        in_group = [best(heads_H, shape.heads_per_group) for heads_H in heads_GH]
        carried_G = np.array([heads_H[chosen].sum() for heads_H, chosen in zip(heads_GH, in_group, strict=True)])
        groups = best(carried_G, shape.num_key_value_heads)
        heads = np.concatenate([group * own.heads_per_group + in_group[group] for group in groups])
        kept.append(KeptLayer(int(layer), heads, groups, best(stats[int(layer)]["neurons"], shape.intermediate_size)))
    return Kept(best(channels_D, shape.hidden_size), tuple(kept))


def best(importance_N: np.ndarray, keep: int) -> np.ndarray:
    """The numbers of the `keep` highest, ascending; ties go to the lower number."""
    return np.sort(np.argsort(-importance_N, kind="stable")[:keep])
