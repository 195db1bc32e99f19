"""Whether a dense class computes the same as the MoE's class outside the experts: what its modules are set to, and what its norms do.
Equal tensors do not tell: a window, a rotary position or a kind of norm is a setting, and two classes have defaults of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_moe2dense.families.probe import first_of, real
from megatron_moe2dense.families.stock import Stock

_PLAIN = (bool, int, float, str, type(None))
_USUAL = "full_attention"  # what a class without kinds of layers has
_ROWS = 8
_EXACT = 1e-6


def unlike(source: Stock, dense: Stock, unless_sliding: tuple[str, ...] = ()) -> str | None:
    """The first module outside the FFNs that is set to something else in the dense class, or whose norm computes something else; None
    where there is none.

    Args:
        unless_sliding: settings that only the MoE's modules have, and that must be off but in layers with a sliding window.
    """
    done: set[tuple[Any, ...]] = set()
    for name, before, after in _pairs(source, dense):
        ours, theirs = _settings(before), _settings(after)
        for setting in ours.keys() & theirs.keys():
            if ours[setting] != theirs[setting]:
                return f"{name} has {setting} {theirs[setting]} instead of {ours[setting]}"
        for setting in unless_sliding:
            if ours.get(setting) and ours.get("sliding_window") is None:
                return f"{name} has {setting} {ours[setting]}, which the class does not know"
        key = (type(before), type(after), *sorted(ours.items()))
        if key not in done and _is_norm(before) and _is_norm(after):
            done.add(key)
            if not _same(before, after):
                return f"{name} is a {type(after).__name__}, which differs from {type(before).__name__}"
    return None


def _pairs(source: Stock, dense: Stock) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules of one name in both: around the layers, and in each layer but for the FFNs."""
    layers = source.layers_in_base
    outside = dict(dense.base.named_modules())
    for name, module in source.base.named_modules():
        if name and not f"{name}.".startswith(layers) and name in outside:
            yield name, module, outside[name]
    for number, layer in enumerate(source.layers):
        inside, ffns = dict(dense.layers[number].named_modules()), _ffns(source, number) | _ffns(dense, number)
        for name, module in layer.named_modules():
            if name in inside and name and not any(f"{name}.".startswith(f"{path}.") for path in ffns):
                yield source.in_model(number, name), module, inside[name]


def _ffns(stock: Stock, layer: int) -> set[str]:
    """Paths in a layer of its FFNs and of all that is part of its MoE."""
    moe = stock.moe.get(layer)
    return {*stock.ffns(layer), *(() if moe is None else {moe.block or moe.experts.path, moe.router, moe.experts.path})}


def _settings(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and not name.startswith("_")}
    return {name: None if value == _USUAL else value for name, value in own.items()}


def _is_norm(module: nn.Module) -> bool:
    """A module with a vector of its own and nothing inside."""
    return not list(module.children()) and [parameter.ndim for parameter in module.parameters()] in ([1], [1, 1])


@torch.no_grad()
def _same(before: nn.Module, after: nn.Module) -> bool:
    """On random rows, with the same weights; what takes more than rows is not judged."""
    width = next(before.parameters()).shape[0]
    x = 2 + torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    try:
        ours, theirs = (first_of(real(module)(x)) for module in (before, after))
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return True
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= _EXACT * ours.abs().max())
