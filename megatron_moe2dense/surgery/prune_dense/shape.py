"""The shape to prune to: as given and checked against the source, or chosen for a number of parameters. No torch."""

from __future__ import annotations

import dataclasses

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.prune_dense.config import MULTIPLE, PruneTarget
from megatron_moe2dense.surgery.prune_dense.source import DenseSource, Shape


def target_shape(source: DenseSource, target: PruneTarget) -> Shape:
    """The shape that `target` asks for.

    Raises:
        UserError: larger than the source somewhere, heads that do not fit their groups, a budget out of reach.
    """
    if target.parameters is not None:
        return _within(source, target.parameters, target.multiple or MULTIPLE)
    own = source.shape
    given = {name: value for name, value in target.sizes().items() if value is not None}
    for name, value in given.items():
        most = getattr(own, name)
        if value > most:
            raise UserError(f"target.{name}={value}", f"at most {most}, the source's", "pruning only makes a model smaller")
    shape = dataclasses.replace(own, **given)
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"{heads} query heads for {groups} key and value heads", "a multiple", "change num_attention_heads or num_key_value_heads"
        )
    if shape.heads_per_group > own.heads_per_group:
        raise UserError(
            f"{heads} query heads for {groups} key and value heads, {shape.heads_per_group} in each group",
            f"at most {own.heads_per_group} in a group, as the source has: a query head can not change its key head",
            f"set target.num_attention_heads to at most {own.heads_per_group * groups}",
        )
    return shape


def _within(source: DenseSource, budget: int, multiple: int) -> Shape:
    """The largest shape of at most `budget` parameters with about the source's ratios (ours).

    Layers, query heads in a group and neurons follow the hidden size in proportion, rounded; groups stay. Hidden size is the largest
    multiple of `multiple` that fits; what is left goes to the FFN's neurons, in multiples too.
    """
    own, whole = source.shape, source.parameters(source.shape)
    if budget >= whole:
        raise UserError(f"target.parameters={budget:,}", f"less than the source's {whole:,}", "lower it: there is nothing to prune")
    candidates = [_in_proportion(own, hidden, multiple) for hidden in range(multiple, own.hidden_size + 1, multiple)]
    fitting = [shape for shape in candidates if source.parameters(shape) <= budget]
    if not fitting:
        least = f"at least {source.parameters(candidates[0]):,}" if candidates else f"multiple of at most {own.hidden_size}"
        raise UserError(
            f"target.parameters={budget:,} in multiples of {multiple}", f"{least}", "raise it, lower target.multiple, or give a shape"
        )
    shape = fitting[-1]
    wider = [
        dataclasses.replace(shape, intermediate_size=width) for width in range(shape.intermediate_size, own.intermediate_size + 1, multiple)
    ]
    return [each for each in wider if source.parameters(each) <= budget][-1]


def _in_proportion(own: Shape, hidden: int, multiple: int) -> Shape:
    def part(size: int, unit: int) -> int:
        """hidden / own.hidden_size of it, to the nearest multiple of `unit`, half up; one unit at least."""
        return max(1, (2 * size * hidden + unit * own.hidden_size) // (2 * unit * own.hidden_size)) * unit

    groups = own.num_key_value_heads
    width = min(part(own.intermediate_size, multiple), own.intermediate_size)
    return Shape(hidden, part(own.num_hidden_layers, 1), part(own.num_attention_heads, groups), groups, width)
