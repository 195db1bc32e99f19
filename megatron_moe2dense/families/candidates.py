"""Configs in which a MoE class, or a dense sibling of it, may hold one FFN in the place of its experts; dense.py tries them. Which of their
keys say how wide FFNs are."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import AutoConfig

from megatron_moe2dense.families.ffn import FfnPlace
from megatron_moe2dense.families.readers import ACTIVE, EXPERTS
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.families.table import FamilyException

# Config keys by which classes make a layer dense, with the value for `layers` layers.
_SWITCHES: dict[str, Any] = {
    "first_k_dense_replace": lambda layers: layers,
    "num_dense_layers": lambda layers: layers,
    "mlp_only_layers": lambda layers: list(range(layers)),
    "mlp_layer_types": lambda layers: ["dense"] * layers,
    "moe_layer_start_index": lambda layers: layers,
    "moe_layers": lambda _layers: [],
}
_GROUPS = ("n_group", "topk_group", "num_expert_group")
_WIDTHS = r"intermediate|ffn_(hidden|dim)|hidden_dim$"  # in the names of keys that count neurons
_MARKS = (999_983, 1_000_003, 1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099, 1_000_117, 1_000_121, 1_000_133)  # primes


def candidates(source: Stock, exception: FamilyException, alone: bool) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Forms to try, best first: what they are called, what makes the config of each, and how many experts it has. alone: without what is
    around the language model, which may take no sibling."""
    sibling = exception.alone if alone and exception.alone is not None else exception.sibling
    if sibling is not None:
        yield sibling, lambda: _around(source, _sibling(source, sibling, exception), alone, exception.wrapper), 0
    if sibling is None or (source.wrapped and not alone):
        for kind, config, count in _of_itself(source, exception):
            yield kind, lambda config=config: _around(source, config, alone), count


def _around(source: Stock, config: Any, alone: bool, wrapper: str | None = None) -> Any:
    if not alone:
        return source.around(config, wrapper)
    config = copy.deepcopy(config)
    config.tie_word_embeddings = source.dims.tied_embeddings  # as the class around it says
    return config


def _of_itself(source: Stock, exception: FamilyException) -> Iterator[tuple[str, Any, int]]:
    if exception.into is not None:
        yield "itself, no experts", _of_experts(source, exception, 1), 0
        return
    if not exception.experts:
        yield "itself, all layers dense", _all_dense(source, exception), 0
    for count in (exception.experts,) if exception.experts else (1, 2):
        yield ("itself, one expert", "itself, two experts")[count - 1], _of_experts(source, exception, count), count


def _of_experts(source: Stock, exception: FamilyException, count: int) -> Any:
    config = copy.deepcopy(source.config)
    for names, value in ((EXPERTS, count), (ACTIVE, count), (_GROUPS, 1)):
        for name in names:
            for place in (config, getattr(config, "ffn_config", None)):
                if place is not None and isinstance(getattr(place, name, None), int):
                    _assign(place, name, value)
    for name, value in exception.config.items():
        _assign(config, name, value)
    return config


def _all_dense(source: Stock, exception: FamilyException) -> Any:
    config = copy.deepcopy(source.config)
    for name, value in _SWITCHES.items():
        if hasattr(config, name):
            _assign(config, name, value(len(source.layers)))
    for name in ("layers_block_type", "layer_types"):
        types = getattr(config, name, None)
        if types is not None and "moe" in types:
            _assign(config, name, ["mlp" if kind == "moe" else kind for kind in types])
    for name, value in exception.config.items():
        _assign(config, name, value)
    return config


def _sibling(source: Stock, sibling: str, exception: FamilyException) -> Any:
    """The source's values of every key that the sibling has; of those it lacks, what the class computes instead."""
    known = AutoConfig.for_model(sibling).to_dict()
    given = {
        name: value for name, value in source.config.to_dict().items() if name in known and name not in ("model_type", "architectures")
    }
    if "head_dim" in known and given.get("head_dim") is None:
        given["head_dim"] = source.config.hidden_size // source.config.num_attention_heads
    if "layer_types" in known and given.get("layer_types") is None:  # a class without them has one window, or none, in all layers
        kind = "full_attention" if getattr(source.config, "sliding_window", None) is None else "sliding_attention"
        given["layer_types"] = [kind] * len(source.layers)
    return AutoConfig.for_model(sibling, **{**given, **exception.config})


def _assign(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError):
        setattr(config, name, value)


def width_of(stock: Stock, layer: int, place: FfnPlace) -> int:
    """Neurons of an FFN of a class, or of one of its experts."""
    return place.sizes(stock.layer_shapes[layer])[0]


def width_keys(stock: Stock) -> dict[tuple[int, str], tuple[str, int]]:
    """The config key of each FFN's width and how many times that it is, by layer and path: every key that may be one is given a value of
    its own."""
    config, marks = copy.deepcopy(stock.config), {}
    widths = {width_of(stock, layer, place) for layer in range(len(stock.layers)) for place in stock.ffns(layer).values()}
    names = [name for name, value in _sizes(config) if re.search(_WIDTHS, name) and any(width % value == 0 for width in widths)]
    for name, mark in zip(names, _MARKS, strict=False):
        marks[mark] = name
        set_key(config, name, mark)
    marked, found = Stock(stock.around(config)), {}
    for layer in range(len(marked.layers)):
        for path, place in marked.ffns(layer).items():
            width = width_of(marked, layer, place)
            mark = next((mark for mark in marks if width % mark == 0), None)
            if mark is not None:
                found[layer, path] = marks[mark], width // mark
    return found


def _sizes(config: Any) -> Iterator[tuple[str, int]]:
    """Every number of a config, one level of nesting down; `a.b` for a nested one."""
    for name, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        elif hasattr(value, "to_dict") and name != "text_config":
            yield from ((f"{name}.{inner}", number) for inner, number in vars(value).items() if isinstance(number, int) and number > 1)


def set_key(config: Any, name: str, value: int) -> None:
    """Give a key its value; `a.b` is one of a nested block."""
    outer, _, inner = name.rpartition(".")
    setattr(getattr(config, outer) if outer else config, inner or name, value)
