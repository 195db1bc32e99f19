"""What a dense checkpoint will hold, before a weight is read: names, shapes and dtypes of all tensors, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_moe2dense.checkpoint.reader import TORCH_DTYPES
from megatron_moe2dense.checkpoint.shards import TensorSpec
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.surgery.densify import densify, pad_width
from megatron_moe2dense.surgery.packing import ReadTensor, read_ffn, write_ffn
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.types import DenseFfn, LayerPlan, NeuronPlan


@dataclass(frozen=True)
class Step:
    """A part of the checkpoint that is written together: a layer, or (None) what belongs to no layer.

    copied: tensors taken over byte for byte. made: tensors of the dense FFN.
    """

    layer: int | None
    copied: tuple[TensorSpec, ...]
    made: tuple[TensorSpec, ...]

    @property
    def made_bytes(self) -> int:
        """Bytes of the dense FFN."""
        return sum(spec.nbytes for spec in self.made)


def dense_width(source: MoeSource, groups: int) -> int:
    """F of the result: G * I and the shared experts, or the width of the family's own dense layers where that is larger (the rest is
    zero)."""
    dims = source.dims
    has_dense_layers = len(source.layers) < dims.layers
    return max(groups * dims.expert_width + dims.shared_width, dims.dense_width if has_dense_layers else 0)


def dense_steps(source: MoeSource, groups: int) -> list[Step]:
    """The whole dense checkpoint of `groups` slices. Shapes come from running the conversion itself on meta tensors."""
    layers, width = range(source.dims.layers), dense_width(source, groups)
    gone = {name for layer in layers for name in replaced(source, layer)} | {*source.beyond_layers()}
    of_layer: dict[int | None, list[TensorSpec]] = {None: [], **{layer: [] for layer in layers}}
    prefixes = {source.layer_prefix(layer): layer for layer in layers}
    stem = source.layer_prefix(0).removesuffix("0.")
    for name, info in source.index.tensors.items():
        if name not in gone:
            prefix = stem + name.removeprefix(stem).partition(".")[0] + "."
            of_layer[prefixes.get(prefix)].append(TensorSpec(name, info.dtype, info.shape))
    steps = [Step(None, tuple(of_layer[None]), ())]
    for layer in layers:
        plan = _placeholder(layer, groups) if layer in source.layers else None
        made = stored_ffn(source, layer, layer_ffn(source, _meta_tensors(source), layer, plan), width)
        specs = tuple(TensorSpec.of(name, tensor) for name, tensor in made.items())
        steps.append(Step(layer, tuple(of_layer[layer]), specs))
    return steps


def _meta_tensors(source: MoeSource) -> ReadTensor:
    """Reads shapes and dtypes without data."""

    def read(name: str, entry: int | None) -> torch.Tensor:
        source.index.require([name])
        info = source.index.tensors[name]
        return torch.empty(info.shape if entry is None else info.shape[1:], dtype=TORCH_DTYPES[info.dtype], device="meta")

    return read


def _placeholder(layer: int, groups: int) -> LayerPlan:
    """A plan of the right shape: each group is one expert, taken as it is."""
    ones = (1.0,) * groups
    return LayerPlan(layer, tuple(range(groups)), tuple(range(groups)), ones, ones)


def dense_size(source: MoeSource, groups: int) -> tuple[int, int]:
    """Parameters and bytes of the dense result with `groups` slices."""
    specs = [spec for step in dense_steps(source, groups) for spec in (*step.copied, *step.made)]
    return sum(spec.parameters for spec in specs), sum(spec.nbytes for spec in specs)


def replaced(source: MoeSource, layer: int) -> list[str]:
    """The tensors of a layer that its dense FFN takes the place of."""
    return source.block_names(layer) if layer in source.layers else source.spec.ffn.names(layer)


def layer_ffn(source: MoeSource, read: ReadTensor, layer: int, plan: LayerPlan | NeuronPlan | None) -> DenseFfn:
    """The dense FFN of a layer. plan: None for a layer without experts."""
    tensors = source.tensors
    if plan is None:
        return read_ffn(read, source.spec.ffn, layer)
    shared = None if tensors.shared is None else read_ffn(read, tensors.shared, layer)
    return densify(plan, lambda expert: read_ffn(read, tensors.experts, layer, expert), shared)


def stored_ffn(source: MoeSource, layer: int, ffn: DenseFfn, width: int) -> dict[str, torch.Tensor]:
    """A layer's FFN, made `width` wide, as the dense family stores it."""
    assert source.spec.dense_target is not None, "a MoE family names its dense target"
    target, ffn = FAMILIES[source.spec.dense_target], pad_width(ffn, width)
    like = ffn.gate_FD
    added = {name.format(layer=layer): like.new_zeros(shape) for name, shape in source.spec.added(source.index.config).items()}
    return {**dict(write_ffn(target.ffn, layer, ffn)), **added}


def making_bytes(source: MoeSource, plan: ConversionPlan) -> int:
    """Memory that making one layer takes at most: its dense FFN three times (slices, whole, padded), its largest group in the
    source's dtype, three experts in float64."""
    made = max(dense_steps(source, plan.groups), key=lambda step: step.made_bytes)
    parameters = sum(spec.parameters for spec in made.made)
    values = 3 * source.dims.hidden_size * source.dims.expert_width
    grouped = [layer.group_of for layer in plan.layers if isinstance(layer, LayerPlan)]
    members = max((group_of.count(group) for group_of in grouped for group in range(plan.groups)), default=1)
    return 3 * made.made_bytes + members * values * made.made_bytes // max(1, parameters) + 3 * 8 * values
