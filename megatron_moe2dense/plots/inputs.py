"""Recognises what a path holds by its content: metrics, records, those of a sweep, ranking, plan or statistics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from megatron_moe2dense.common import records
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import read_json
from megatron_moe2dense.plots.sweep import is_sweep

Kind = Literal["metrics", "records", "sweep", "ranking", "plan", "statistics"]
_FILES = ("metrics.jsonl", "records.jsonl", "ranking.json", "plan.json", "stats.safetensors")
_COUNT = re.compile(r"layers\.(\d+)\.selected_count$")


@dataclass(frozen=True)
class Statistics:
    """What figures need of stats.safetensors, by layer number. shares: of the tokens, that select each expert, [E].
    grams: inner products of the experts' outputs, [E, E]; empty when they were not collected."""

    shares: dict[int, np.ndarray]
    grams: dict[int, np.ndarray]


@dataclass(frozen=True)
class Input:
    """One recognised file. label: for legends, the folder's name. content: rows of a .jsonl, the object of a .json, or
    Statistics."""

    kind: Kind
    label: str
    path: Path
    content: Any


def read_inputs(paths: Sequence[str]) -> list[Input]:
    """Every file named, and every known file in the directories named, in order.

    Raises:
        UserError: a path that is missing, holds nothing known, is empty, or is read twice.
    """
    found: list[Input] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = [path / name for name in _FILES if (path / name).exists()]
            if not files:
                raise UserError(f"{path} holds nothing to plot", f"a directory with {', '.join(_FILES)}", "check the path")
        else:
            files = [path]
        found += [_read(file) for file in files]
    seen = [item.path.resolve() for item in found]
    twice = [path for path in seen if seen.count(path) > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice", "each input once", "remove one of them")
    return _distinct(found)


def _read(path: Path) -> Input:
    label = path.resolve().parent.name if path.name in _FILES else path.stem
    if path.suffix == ".jsonl":
        kind, content = _rows(path)
    elif path.suffix == ".json":
        kind, content = _object(path)
    elif path.suffix == ".safetensors":
        kind, content = "statistics", _statistics(path)
    else:
        kind, content = None, None
    if kind is None:
        raise UserError(f"{path}: nothing known", f"the content of one of {', '.join(_FILES)}", "name outputs of `moe2dense`")
    return Input(kind, label, path, content)


def _rows(path: Path) -> tuple[Kind | None, list[dict[str, Any]]]:
    rows = records.read(path)
    if not rows:
        raise UserError(f"{path} has no rows", "rows to plot", "wait for the first row, or leave the file out")
    if all(isinstance(row, dict) and isinstance(row.get("metrics"), dict) and "model" in row for row in rows):
        return "sweep" if all(map(is_sweep, rows)) else "records", rows
    if all(isinstance(row, dict) and {"step", "tokens"} <= row.keys() and row.keys() & {"loss", "eval_loss", "spike"} for row in rows):
        return "metrics", rows
    return None, rows


def _object(path: Path) -> tuple[Kind | None, Any]:
    content = read_json(path, "a ranking.json or plan.json")
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        return None, content
    if all({"layer", "experts", "scores", "selected_fraction"} <= layer.keys() for layer in layers):
        return "ranking", content
    if all({"layer", "experts", "group_of", "scales"} <= layer.keys() for layer in layers):
        return "plan", content
    return None, content


def _statistics(path: Path) -> Statistics:
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            layers = sorted(int(match[1]) for match in map(_COUNT.match, names) if match)
            if not layers or any(f"layers.{i}.tokens" not in names for i in layers):
                found = f"{path} has no selected_count with its tokens"
                raise UserError(found, "statistics with selected_count", "calibrate with statistics=all")
            shares = {i: file.get_tensor(f"layers.{i}.selected_count") / file.get_tensor(f"layers.{i}.tokens") for i in layers}
            grams = {i: file.get_tensor(f"layers.{i}.gram") for i in layers if f"layers.{i}.gram" in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}", "the statistics of `moe2dense calibrate`", "check the path, or calibrate again") from None
    return Statistics(shares, grams)


def _distinct(items: list[Input]) -> list[Input]:
    """Labels made distinct inside a kind: by the parent folder's name where two folders are called the same."""

    def distinct(item: Input) -> str:
        same = [other for other in items if other.kind == item.kind and other.label == item.label]
        return item.label if len(same) == 1 else f"{item.path.resolve().parent.parent.name}/{item.label}"

    return [Input(item.kind, distinct(item), item.path, item.content) for item in items]
