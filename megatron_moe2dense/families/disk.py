"""Names on disk and tensors in memory, both ways: transformers' own conversion mapping as data, one tensor, or one expert, at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    GroupWeightRename,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from megatron_moe2dense.families.stock import Shape, Stock

# (tensor name, None for the whole tensor or the rows of its first axis that are wanted) -> values as stored
ReadTensor = Callable[[str, slice | None], torch.Tensor]


@dataclass
class _Entry:
    """Tensors on disk that become one in memory, or a few. gives: their shapes by name; None where some on disk are absent or do not fit
    each other. converter: None for a plain one under another name."""

    names: dict[str, list[str]] = field(default_factory=dict)
    converter: WeightConverter | None = None
    gives: dict[str, Shape | None] = field(default_factory=dict)

    @property
    def stored(self) -> list[str]:
        return [name for names in self.names.values() for name in names]


class Disk:
    """A checkpoint's tensors in the names and forms of its stock class.

    Args:
        stock: the class. shapes: of the tensors on disk, by name.

    Attributes:
        unknown: tensors on disk that the class does not have. missing: tensors of the class that are not on disk.
    """

    def __init__(self, stock: Stock, shapes: Mapping[str, Shape]):
        self._stock = stock
        self._shapes = shapes
        self._renamings, self._converters = _mapping(stock)
        self._entries: dict[str, _Entry] = {}
        self._of: dict[str, str] = {}
        self.unknown: list[str] = []
        for name in sorted(shapes, key=dot_natural_key):
            target, converter, pattern = self._place(name)
            entry = self._entries.setdefault(target, _Entry(converter=converter))
            entry.names.setdefault(pattern, []).append(name)
        known = stock.shapes
        for target, entry in list(self._entries.items()):
            entry.gives = self._given(target, entry)
            if not entry.gives.keys() <= known.keys():
                self.unknown += entry.stored
                del self._entries[target]
            self._of.update(dict.fromkeys(entry.gives, target))
        self.missing = [name for name in known if name not in self._of and name not in _tied(stock)]

    def _given(self, target: str, entry: _Entry) -> dict[str, Shape | None]:
        try:
            return {name: tuple(tensor.shape) for name, tensor in self._run(target, entry, self._meta).items()}
        except (RuntimeError, ValueError, KeyError, IndexError, AttributeError):
            return dict.fromkeys(self._made_with(target))

    def _made_with(self, name: str) -> tuple[str, ...]:
        """A tensor in memory, and those that one conversion makes together with it."""
        for converter in self._converters:
            for own in converter.target_patterns:
                others = (name.replace(own, other) for other in converter.target_patterns if own in name and other != own)
                if beside := [other for other in others if other in self._stock.shapes]:
                    return name, *beside
        return (name,)

    def _place(self, name: str) -> tuple[str, WeightConverter | None, str]:
        """Name in memory (the first, where there are several), what converts it, and its pattern there."""
        prefix = self._stock.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._stock.shapes)  # type: ignore[arg-type]
        if target not in self._stock.shapes and name in self._stock.shapes:
            target, pattern = rename_source_key(name, [], [], prefix, self._stock.shapes)  # type: ignore[arg-type]
        if pattern is None:
            return target, None, name
        return target, next(each for each in self._converters if pattern in each.source_patterns), pattern

    def _meta(self, name: str, rows: slice | None) -> torch.Tensor:
        shape = self._shapes[name]
        return torch.empty(shape if rows is None else (rows.stop - rows.start, *shape[1:]), device="meta")

    def _run(self, target: str, entry: _Entry, read: ReadTensor, rows: slice | None = None) -> dict[str, torch.Tensor]:
        """What an entry gives in memory; rows: of the axis that counts experts, wherever that stands on disk."""
        if entry.converter is None:
            return {target: read(entry.stored[0], rows)}
        converter = deepcopy(entry.converter)
        for pattern, names in entry.names.items():
            each = "*" in pattern  # a tensor for each expert
            for name in names if rows is None or not each else names[rows]:
                converter.add_tensor(target, name, pattern, read(name, None if each else rows))  # type: ignore[arg-type]
        model = self._stock.model if rows is None else _SomeExperts(self._stock.shapes, rows)
        found = converter.convert(target, model=model, config=self._stock.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}

    def names_of(self, name: str, rows: slice | None = None) -> list[str]:
        """The tensors on disk that hold a tensor of the class (some may hold others beside it); none where it is tied to another.

        rows: only what holds these of its first axis, where experts have tensors of their own.
        """
        if name not in self._of:
            return []
        entry = self._entries[self._of[name]]
        if rows is None:
            return entry.stored
        return [each for pattern, names in entry.names.items() for each in (names[rows] if "*" in pattern else names)]

    def is_plain(self, name: str) -> bool:
        """Whether the tensor stands on disk as it is in memory."""
        return name in self._of and self._entries[self._of[name]].converter is None

    def tensor(self, name: str, read: ReadTensor, rows: slice | None = None) -> torch.Tensor:
        """A tensor of the class; rows: only those of its first axis."""
        target = self._of[name]
        return self._run(target, self._entries[target], read, rows)[name]

    def saved(self, *names: str) -> dict[str, Shape]:
        """Names on disk, and shapes, as which the class saves tensors, and those that they are saved together with."""
        entries = ((name, self._entries.get(self._of.get(name, ""))) for name in names)
        whole = [each for name, entry in entries for each in (self._made_with(name) if entry is None else entry.gives)]
        found = revert(self._stock, {each: torch.empty(self._stock.shapes[each], device="meta") for each in whole})
        return {name: tuple(tensor.shape) for name, tensor in found.items()}

    def shape(self, name: str) -> Shape | None:
        """What the files make of a tensor of the class; None where they make none of it."""
        return self._entries[self._of[name]].gives[name]

    def where(self, name: str) -> tuple[str, str]:
        """Name in memory of a name on disk, and its pattern there: what decides how the class takes it."""
        target, _, pattern = self._place(name)
        return target, "" if pattern == name else pattern


class _SomeExperts:
    """Stands for the model where a conversion asks for a parameter's shape: of some experts."""

    def __init__(self, shapes: Mapping[str, Shape], rows: slice):
        self._shapes, self._count = shapes, rows.stop - rows.start

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self._count, *self._shapes[name][1:], device="meta")


def _mapping(stock: Stock) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = get_model_conversion_mapping(stock.model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    return renamings, [each for each in transforms if isinstance(each, WeightConverter)]


def _reverse_mapping(stock: Stock) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """From names in memory to names on disk. Transformers 5.23: a GroupWeightRename (Kimi K2.5's) does nothing before it has met the first
    name of its group, so it is shown all names of the class in the order in which they are saved."""
    transforms = [each for each in get_model_conversion_mapping(stock.model, add_legacy=False) if not isinstance(each, PrefixChange)]
    reverse = [each.reverse_transform() for each in transforms[::-1]]
    renamings = [each for each in reverse if isinstance(each, WeightRenaming)]
    if any(isinstance(each, GroupWeightRename) for each in renamings):
        for name in sorted(stock.shapes, key=dot_natural_key):
            apply_renamings(name, renamings)
    return renamings, [each for each in reverse if isinstance(each, WeightConverter)]


def _tied(stock: Stock) -> set[str]:
    """Tensors that a checkpoint may leave out, as they are another's."""
    return set(stock.model.all_tied_weights_keys)


def revert(stock: Stock, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a class in the names and forms that it saves them in."""
    renamings, converters = _reverse_mapping(stock)
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    running: dict[str, WeightConverter] = {}
    found: dict[str, torch.Tensor] = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = apply_converters(name, converters)
        if pattern is None:
            found[apply_renamings(name, renamings)] = tensors[name]
        else:
            running.setdefault(renamed, deepcopy(by_pattern[pattern])).add_tensor(renamed, name, pattern, tensors[name])  # type: ignore[arg-type]
    for first, converter in running.items():
        for name, tensor in converter.convert(first, model=stock.model, config=stock.model.config).items():
            found[apply_renamings(name, renamings)] = tensor[0] if isinstance(tensor, list) else tensor
    return found


def plain_names(stock: Stock, names: Iterable[str]) -> dict[str, str]:
    """Names on disk of tensors of a class that it saves as they are; those it converts are left out."""
    renamings, converters = _reverse_mapping(stock)
    return {name: apply_renamings(name, renamings) for name in names if apply_converters(name, converters)[1] is None}
