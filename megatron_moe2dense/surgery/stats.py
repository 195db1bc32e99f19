"""Calibration statistics (docs/method.md#statistics): a table of sums over tokens, per-layer containers that add, files. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from megatron_moe2dense.checkpoint.index import read_header
from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.common.outputs import disk_errors, read_manifest

STATS_FILE = "stats.safetensors"


@dataclass(frozen=True)
class Statistic:
    """One row of the table: its shape in the package's letters, what is summed over tokens, whether every expert must
    run on every token for it (else the selected ones suffice)."""

    name: str
    letters: str
    summand: str
    every_expert: bool = False

    def shape(self, experts: int, hidden: int, width: int) -> tuple[int, ...]:
        """The shape for a layer of `experts` routed experts of `width` neurons and hidden size `hidden`; () is stored as (1,)."""
        sizes = {"E": experts, "D": hidden, "I": width}
        return tuple(sizes[letter] for letter in self.letters) or (1,)


STATISTICS: dict[str, Statistic] = {
    row.name: row
    for row in (
        Statistic("tokens", "", "1"),
        Statistic("selected_count", "E", "1[e in S(t)]"),
        Statistic("prob_sum", "E", "p_e(t)"),
        Statistic("selected_prob_sum", "E", "p_e(t) 1[e in S(t)]"),
        Statistic("gate_sum", "E", "g_e(t)"),
        Statistic("gated_norm_sum", "E", "g_e(t) ||f_e(t)||_2"),
        Statistic("selected_norm_sum", "E", "||f_e(t)||_2 1[e in S(t)]"),
        Statistic("gram", "EE", "<f_i(t), f_j(t)>", every_expert=True),
        Statistic("output_sum", "ED", "f_e(t)", every_expert=True),
        Statistic("prob_gram", "EE", "p_i(t) p_j(t)"),
        Statistic("neuron_energy", "EI", "g_e(t)^2 h_ei(t)^2"),
    )
}

# Collected as well, always, where the shared experts have a sigmoid gate h of their own; s is their output without it.
SHARED_GATE_STATISTICS: dict[str, Statistic] = {
    row.name: row
    for row in (
        Statistic("shared_gated_square_sum", "", "h(t) ||s(t)||_2^2"),
        Statistic("shared_square_sum", "", "||s(t)||_2^2"),
    )
}

# Where a gate multiplies what goes into the one expert that a token selects: x in the other statistics is that product, g_e then 1.
INPUT_GATE_STATISTICS: dict[str, Statistic] = {"input_gate_sum": Statistic("input_gate_sum", "", "the gate")}


@dataclass(frozen=True)
class LayerStats:
    """The sums of one MoE layer, float64, by statistic name; always with `tokens`. `a + b` covers the tokens of both."""

    sums: Mapping[str, np.ndarray]

    def __add__(self, other: LayerStats) -> LayerStats:
        assert self.sums.keys() == other.sums.keys(), "statistics of the same names add"
        return LayerStats({name: value + other.sums[name] for name, value in self.sums.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        """The sum `name`; UserError when it was not collected."""
        self.require([name])
        return self.sums[name]

    @property
    def tokens(self) -> float:
        """How many tokens the sums cover."""
        return float(self.sums["tokens"][0])

    def require(self, names: Iterable[str]) -> None:
        """UserError when a statistic of `names` was not collected."""
        missing = sorted(set(names) - set(self.sums))
        if missing:
            raise UserError(
                f"statistics without {', '.join(missing)} (they hold {', '.join(sorted(self.sums))})",
                f"{', '.join(sorted(names))}: the chosen methods need them",
                "run `moe2dense calibrate` again with statistics=all, or choose another method",
            )


def chosen_statistics(wanted: str | list[str]) -> tuple[str, ...]:
    """ "all" or a list of names to names in table order, `tokens` always included; ValueError for an unknown name."""
    if wanted == "all":
        return tuple(STATISTICS)
    names = [wanted] if isinstance(wanted, str) else wanted
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}; {did_you_mean(name, STATISTICS)} known: all, {', '.join(STATISTICS)}")
    return tuple(name for name in STATISTICS if name in names or name == "tokens")


def save_stats(path: Path, layers: Mapping[int, LayerStats]) -> None:
    """Write `layers.{i}.{statistic}` float64 tensors."""
    tensors = {f"layers.{i}.{name}": np.ascontiguousarray(value, np.float64) for i, s in layers.items() for name, value in s.sums.items()}
    with disk_errors(path):
        save_file(tensors, path, metadata={"format": "np"})


def load_layers(path: Path) -> dict[int, LayerStats]:
    """What `save_stats` wrote, in the order of the layers."""
    sums: dict[int, dict[str, np.ndarray]] = {}
    for name, value in load_file(path).items():
        _, layer, statistic = name.split(".")
        sums.setdefault(int(layer), {})[statistic] = value
    return {i: LayerStats(sums[i]) for i in sorted(sums)}


@dataclass(frozen=True)
class CalibratedStats:
    """A finished output of `moe2dense calibrate`.

    source: {"path", "fingerprint", "family", "experts", "active"} of the calibrated model. layers: sums by layer number.
    """

    directory: Path
    source: dict[str, Any]
    layers: dict[int, LayerStats]

    @classmethod
    def open(cls, directory: str | Path) -> CalibratedStats:
        """Read the manifest and all sums; UserError when either is missing, unfinished, damaged or does not fit the other."""
        directory = Path(directory)
        source = read_manifest(directory, "calibrate")["source"]
        path = directory / STATS_FILE
        if not path.exists():
            raise UserError(f"{directory} has no {STATS_FILE}", "the output of `moe2dense calibrate`", "run calibrate again")
        read_header(path)
        layers = load_layers(path)
        for i, layer_stats in layers.items():
            _check(path, i, layer_stats, source["experts"])
        return cls(directory, source, layers)

    def require(self, names: Iterable[str]) -> None:
        """UserError when a statistic of `names` was not collected."""
        names = list(names)
        for layer_stats in self.layers.values():
            layer_stats.require(names)


def _check(path: Path, layer: int, stats: LayerStats, experts: int) -> None:
    for name, value in stats.sums.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} of layer {layer} has NaN or infinite values", "finite sums", "run calibrate again")
        if name in STATISTICS and STATISTICS[name].letters.startswith("E") and value.shape[0] != experts:
            found = f"{path}: {name} of layer {layer} has shape {list(value.shape)}"
            raise UserError(found, f"{experts} experts, as its moe2dense.json says", "run calibrate again")
    if stats.tokens <= 0:
        raise UserError(f"{path}: layer {layer} covers no token", "at least one token", "run calibrate again")
