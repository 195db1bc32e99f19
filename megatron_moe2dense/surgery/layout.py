"""What a dense checkpoint will hold, before a weight is read: names, shapes and dtypes of all tensors, layer after layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from megatron_moe2dense.checkpoint.reader import TORCH_DTYPES
from megatron_moe2dense.checkpoint.shards import TensorSpec
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.dense import Dense
from megatron_moe2dense.families.disk import Disk, ReadTensor, plain_names, revert
from megatron_moe2dense.families.ffn import Ffn
from megatron_moe2dense.families.readers import contradictions, differences, for_all_readers, left_to_defaults
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.families.widths import rounded_up
from megatron_moe2dense.surgery.densify import densify, neurons_of, pad_width, rescaled, side_by_side
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.refit.layer import LayerFit
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.types import LayerPlan, NeuronPlan


@dataclass(frozen=True)
class Step:
    """A part of the checkpoint that is written together: a layer, or (None) what belongs to no layer.

    copied: tensors taken over as they are, or decoded, by the name that they have in the source. made: tensors of the dense FFN.
    """

    layer: int | None
    copied: Mapping[str, TensorSpec]
    made: tuple[TensorSpec, ...]

    @property
    def made_bytes(self) -> int:
        """Bytes of the dense FFN."""
        return sum(spec.nbytes for spec in self.made)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Everything that is written."""
        return (*self.copied.values(), *self.made)


def dense_of(source: MoeSource, groups: int) -> Dense:
    """The dense class with room for `groups` experts and the shared ones."""
    return source.form.of(_neurons(source, groups), source.pad_to)


def _neurons(source: MoeSource, groups: int) -> int:
    """That a plan makes for a MoE layer: G * I and those of the shared experts."""
    return groups * source.dims.expert_width + (source.dims.shared_width if source.form.absorbs_shared else 0)


def dense_width(source: MoeSource, groups: int) -> int:
    """Neurons of the MoE layers of the result: G * I and the shared experts, more where the class has one width for all layers or kernels
    want multiples (the rest is zero)."""
    return dense_of(source, groups).width(source.layers[0])


@dataclass(frozen=True)
class Padding:
    """Neurons of zeros of a dense result. multiple: what every width is one of. width: of a MoE layer, `zeros` of it padded. neurons: of
    all layers. parameters: theirs."""

    multiple: int
    width: int
    zeros: int
    neurons: int
    parameters: int

    @property
    def said(self) -> str:
        """For people; nothing where there are none."""
        if not self.neurons:
            return ""
        inside = f"{self.zeros} of the {self.width} in a MoE layer"
        return f"{self.neurons:,} neurons of zeros, {self.parameters:,} parameters ({inside}), for widths in multiples of {self.multiple}"


def room(source: MoeSource, groups: int) -> int:
    """Neurons of a layer's experts that fit into a result of `groups` slices: G * I, and what rounding up leaves, up to all E * I."""
    filled = source.form.filled(source.layers[0], _neurons(source, groups))
    spare = rounded_up(filled, source.pad_to) - filled
    return min(groups * source.dims.expert_width + spare, source.dims.experts * source.dims.expert_width)


def padding(source: MoeSource, groups: int, chosen: int | None = None) -> Padding:
    """What is filled up with zeros in a result of `groups` slices. chosen: neurons of a layer's experts in it, G * I by default."""
    dense, first = dense_of(source, groups), source.layers[0]
    more = 0 if chosen is None else chosen - groups * source.dims.expert_width
    zeros = {layer: dense.width(layer) - source.form.filled(layer, _neurons(source, groups) + more) for layer in dense.slots}
    parameters = sum(count * dense.parameters_of_neuron(layer) for layer, count in zeros.items())
    return Padding(source.pad_to, dense.width(first), zeros[first], sum(zeros.values()), parameters)


def effective_pad_to(source: MoeSource, groups: Iterable[int]) -> int:
    """1 where widths are such multiples anyway, for each number of slices: what is written does not differ then, nor is it another run."""
    needed = [_neurons(source, count) for count in groups]
    same = all(source.form.widths(neurons, source.pad_to) == source.form.widths(neurons, 1) for neurons in needed)
    return 1 if same else source.pad_to


@cache
def _dense_steps(source: MoeSource, groups: int) -> tuple[Step, ...]:
    dense, layers = dense_of(source, groups), range(source.dims.layers)
    made = {layer: _made(source, dense, layer, groups) for layer in layers}
    gone = {name for layer in dense.slots for name in replaced(source, layer)} | {*source.account.left_out}
    of_layer: dict[int | None, dict[str, TensorSpec]] = {None: {}, **{layer: {} for layer in layers}}
    for name, new in _copied(source, dense, gone).items():
        like = torch.empty(source.values.shapes[name], dtype=source.dtype(name), device="meta")
        of_layer[_layer_of(source, name)][name] = TensorSpec.of(new, like)
    steps = [Step(None, of_layer[None], ()), *(Step(layer, of_layer[layer], made[layer]) for layer in layers)]
    _require_taken(source, dense.stock, steps)
    return tuple(steps)


def dense_steps(source: MoeSource, groups: int) -> list[Step]:
    """The whole dense checkpoint of `groups` slices. Shapes come from running the conversion itself on meta tensors.

    Raises:
        UserError: the dense class would not take it as it is.
    """
    return list(_dense_steps(source, groups))


def dense_config(source: MoeSource, groups: int) -> dict[str, Any]:
    """The content of config.json. The type is the source's own word, or, where it has none or was quantised, that of what is written."""
    config = source.account.config
    if source.values.encoded or config.get("dtype", config.get("torch_dtype")) is None:
        sizes: Counter[str] = Counter()
        for spec in (spec for step in dense_steps(source, groups) for spec in step.specs):
            sizes[spec.dtype] += spec.nbytes
        kinds = [TORCH_DTYPES[name] for name, _ in sizes.most_common() if TORCH_DTYPES[name].is_floating_point]
        config = {**config, "dtype": str(kinds[0]).removeprefix("torch.")}
    return for_all_readers(dense_of(source, groups).config(config))


def require_read_alike(source: MoeSource, groups: int) -> None:
    """UserError when the dense config.json, read by itself, is another class than the one that the tensors are made for, or says something
    else than was meant, or does not say a key of the class: a reader fills in a default for what was left out."""
    dense, config = dense_of(source, groups), dense_config(source, groups)
    read = Stock.of(config, "the dense result's config.json")
    _require_taken(source, read, dense_steps(source, groups))
    believed = read.model.config.to_dict()
    wrong = differences(dense.stock.model.config.to_dict(), believed) + contradictions(believed)
    wrong += [f"{name} is left to a default" for name in left_to_defaults(config, believed, Stock.usual_keys())]
    if wrong:
        raise UserError(
            f"{source.index.directory}: of the dense config.json {wrong[0]} ({len(wrong)} such keys)",
            "a config.json that is read as it was meant",
            "this source can not be converted; please report its config.json",
        )


def _made(source: MoeSource, dense: Dense, layer: int, groups: int) -> tuple[TensorSpec, ...]:
    if layer not in dense.slots:
        tensors = stored_added(dense, layer, torch.empty(0, dtype=_dtype(source, layer), device="meta"))
    else:
        plan = _placeholder(layer, groups) if layer in source.layers else None
        tensors = stored_ffn(dense, layer, layer_ffn(source, _meta_tensors(source), layer, plan))
    return tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())


def _dtype(source: MoeSource, layer: int) -> torch.dtype:
    """The type in which a layer's first tensor is read."""
    names = (name for each in source.stock.layer_shapes[layer] for name in source.disk.names_of(source.stock.in_model(layer, each)))
    return source.values.dtype(next(names))


def _layer_of(source: MoeSource, name: str) -> int | None:
    target = source.disk.where(name)[0]
    head, _, number = target.removeprefix(f"{source.stock.prefix}.").partition(".")
    return (
        int(head) if target.startswith(f"{source.stock.prefix}.") and number and head.isdigit() and int(head) < source.dims.layers else None
    )


def _copied(source: MoeSource, dense: Dense, gone: set[str]) -> dict[str, str]:
    """Names in the source and in the result of all tensors that are neither made nor left out: the source's own where the dense class
    takes it for the same thing, else that under which the class saves it."""
    names = [name for name in source.values.shapes if not gone.intersection(source.values.stored(name))]
    taken = Disk(dense.stock, {name: source.values.shapes[name] for name in names})
    found = {}
    for name in names:
        target, pattern = source.disk.where(name)
        wanted = source.form.takes(target)
        if wanted is None:
            continue
        same = taken.where(name) == (wanted, pattern)
        if same and (pattern or not source.form.alone):
            found[name] = name
            continue
        renamed = plain_names(dense.stock, [wanted]).get(wanted)
        if pattern or renamed is None:
            raise UserError(
                f"{source.index.directory}: {name}, which {dense.stock.name} stores in another form",
                "tensors outside the MoE blocks that the dense class stores alike",
                "save the checkpoint with transformers' save_pretrained first",
            )
        found[name] = renamed
    return found


def _require_taken(source: MoeSource, stock: Stock, steps: Iterable[Step]) -> None:
    """UserError when the dense class lacks a tensor of the result, or wants one that it has not, or another shape."""
    shapes = {spec.name: spec.shape for step in steps for spec in step.specs}
    taken = Disk(stock, shapes)
    wrong = [f"{name} is not known" for name in taken.unknown]
    wrong += [f"{name} is missing" for name in taken.missing]
    wrong += [
        f"{name} is {list(found or ())} instead of {list(shape)}"
        for name, shape in stock.shapes.items()
        if taken.names_of(name) and (found := taken.shape(name)) != shape
    ]
    if wrong:
        raise UserError(
            f"{source.index.directory} as {stock.name}: {wrong[0]} ({len(wrong)} such tensors)",
            "a dense class that takes every tensor of the result",
            "this source can not be converted; please report its config.json",
        )


def _meta_tensors(source: MoeSource) -> ReadTensor:
    """Reads shapes and dtypes without data."""

    def read(name: str, rows: slice | None) -> torch.Tensor:
        shape = source.values.shapes[name]
        size = shape if rows is None else (rows.stop - rows.start, *shape[1:])
        return torch.empty(size, dtype=source.dtype(name), device="meta")

    return read


def _placeholder(layer: int, groups: int) -> LayerPlan:
    """A plan of the right shape: each group is one expert, taken as it is."""
    ones = (1.0,) * groups
    return LayerPlan(layer, tuple(range(groups)), tuple(range(groups)), ones, ones)


def dense_size(source: MoeSource, groups: int) -> tuple[int, int]:
    """Parameters and bytes of the dense result with `groups` slices."""
    specs = [spec for step in dense_steps(source, groups) for spec in step.specs]
    return sum(spec.parameters for spec in specs), sum(spec.nbytes for spec in specs)


def replaced(source: MoeSource, layer: int) -> list[str]:
    """The tensors of a layer, by name in the files, that its dense FFN takes the place of."""
    form, stock = source.form, source.stock
    names = [name for name in stock.layer_shapes[layer] if stock.in_model(layer, name) in form.replaced | form.of_dense_layers]
    return source.stored(layer, names)


def seam_ffn(source: MoeSource, read: ReadTensor, layer: int, plan: LayerPlan | NeuronPlan) -> Ffn:
    """What a plan puts in the place of a MoE layer's block, or of the experts in it (`source.seam`)."""
    shared = source.shared(read, layer) if source.seam == "block" else None
    return densify(plan, lambda expert: source.expert(read, layer, expert), shared, source.seam_units)


def layer_ffn(source: MoeSource, read: ReadTensor, layer: int, plan: LayerPlan | NeuronPlan | None, fit: LayerFit | None = None) -> Ffn:
    """The dense FFN of a layer as it is written. plan: None for a layer without experts. fit: of what stands in the seam."""
    if plan is None:
        return source.ffn(read, layer, source.form.dense_place(layer))
    ffn = seam_ffn(source, read, layer, plan)
    ffn = ffn if fit is None else fit.applied(ffn)
    if source.seam == "block":
        return ffn
    parts = [rescaled(ffn, source.routed_factor)]
    if (shared := source.shared(read, layer)) is not None:
        parts.append(rescaled(shared, plan.shared_scale * source.facts_of_block.shared_factor))
    if source.form.exception.into is not None:
        parts.append(source.ffn(read, layer, source.stock.ffns(layer)[source.form.exception.into]))
    return parts[0] if len(parts) == 1 else side_by_side(parts)


def stored_ffn(dense: Dense, layer: int, ffn: Ffn) -> dict[str, torch.Tensor]:
    """A layer's FFN in the places of the dense class, and what the class has beside it, by name in the files."""
    shapes, start = dense.stock.layer_shapes[layer], 0
    tensors: dict[str, torch.Tensor] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for slot in dense.slots[layer]:
        width, _ = slot.place.sizes(shapes)
        part = pad_width(rescaled(neurons_of(ffn, start, min(start + width, len(ffn.up_FD))), 1.0 / slot.factor), width)
        start += width
        for name, tensor in slot.place.write(part):
            whole = dense.stock.in_model(layer, name)
            if slot.expert is None:
                tensors[whole] = tensor.contiguous()
            else:
                stacks.setdefault(whole, []).append(tensor)
    for name, parts in stacks.items():
        flat = next(slot.place.flat for slot in dense.slots[layer])
        tensors[name] = torch.cat(parts).contiguous() if flat else torch.stack(parts).contiguous()
    return revert(dense.stock, {**tensors, **_added(dense, layer, ffn.up_FD)})


def stored_added(dense: Dense, layer: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the dense class has beside the FFNs of a layer and the MoE lacks, by name in the files; like: of its type and device."""
    return revert(dense.stock, _added(dense, layer, like))


def _added(dense: Dense, layer: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    inside = dense.stock.in_model(layer, "")
    added = {name: value for name, value in dense.added.items() if name.startswith(inside)}
    return {name: value.to(like) if value.is_floating_point() else value.to(like.device) for name, value in added.items()}


def making_bytes(source: MoeSource, plan: ConversionPlan) -> int:
    """Memory that making one layer takes at most: its dense FFN three times (slices, whole, padded), its largest group in the
    source's dtype, three experts in float64."""
    made = max(dense_steps(source, plan.groups), key=lambda step: step.made_bytes)
    parameters = sum(spec.parameters for spec in made.made)
    values = 3 * source.dims.hidden_size * source.dims.expert_width
    grouped = [layer.group_of for layer in plan.layers if isinstance(layer, LayerPlan)]
    members = max((group_of.count(group) for group_of in grouped for group in range(plan.groups)), default=1)
    return 3 * made.made_bytes + members * values * made.made_bytes // max(1, parameters) + 3 * 8 * values
