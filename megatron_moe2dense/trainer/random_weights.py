"""Random weights, each drawn from the seed and its name in the stock class alone: the same bytes in every parallel layout.

Megatron-Core draws from one random state a rank, which every pipeline stage and every expert-parallel rank begins alike: layers and
experts of different ranks repeat each other, and another layout is another model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import Entry
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec
from megatron_moe2dense.trainer.weights import local_slices, weights_of_rank

# What leads back into the residual stream: Megatron-Core divides its deviation by the root of how many there are.
_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def draw(chunks: Sequence[HeadlessGPT], spec: ModelSpec, groups: Groups, seed: int, ffns_alone: bool = False) -> None:
    """Fill the matrices (and a router's bias) of the model's chunks; each rank keeps its slices of what all would draw.

    Normal, of the deviation `initializer_range`, divided by sqrt(2 layers) in output projections, as Megatron-Core's own. Other biases
    and padding of the vocabulary are zero; norms and sinks stay as the model was built.

    Args:
        seed: of the draw. ffns_alone: leave everything but the FFN blocks as it is.
    """
    for parameter, entry, *_ in weights_of_rank(chunks, spec, groups):
        name = entry.rule.megatron
        if ffns_alone and ".mlp." not in name:
            continue
        if parameter.dim() < 2 and not name.endswith("router.bias"):
            if name.endswith("bias"):
                parameter.zero_()
            continue
        whole = [_normal(f"{seed} {place}", shape) for place, shape in _matrices(parameter, entry, spec, groups)]
        deviation = spec.class_config["initializer_range"] / (math.sqrt(2 * spec.dims.layers) if name.endswith(_OUTPUTS) else 1.0)
        parameter.copy_(local_slices(whole, entry, spec, groups) * deviation)


def _matrices(parameter: Tensor, entry: Entry, spec: ModelSpec, groups: Groups) -> list[tuple[str, tuple[int, ...]]]:
    """Names and whole shapes of the matrices that a parameter is joined from. Where one tensor holds several, its name goes on."""
    rule, dims, names = entry.rule, spec.dims, entry.names
    rows, rest = parameter.shape[0], tuple(parameter.shape[1:])
    if rule.kind == "vocab":
        return [(names[0], (dims.vocab_size, *rest))]
    if rule.kind == "qkv":
        heads = (dims.heads, dims.kv_heads, dims.kv_heads)
        return [(name, (count * dims.head_dim, *rest)) for name, count in zip(names, heads, strict=True)]
    parts = groups.parallel.expert_tensor if entry.is_expert else groups.parallel.tensor
    number = "" if entry.expert is None else f"[{entry.expert}]"
    if rule.kind == "gate_up":
        both = names if len(names) == 2 else [f"{names[0]}.{part}" for part in ("gate", "up")]
        return [(name + number, (rows // 2 * parts, *rest)) for name in both]
    shape = list(parameter.shape)
    if rule.split is not None:
        shape[rule.split] *= parts
    return [(names[0] + number, tuple(shape))]


def _normal(place: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 from a counter-based generator, whose numbers depend on no machine."""
    key = int.from_bytes(hashlib.sha256(place.encode()).digest()[:16], "little")
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32))
