"""KL over distillation tokens: arms of several seeds and budgets, and the tokens that the recipe saves."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megatron_moe2dense.plots.style import PALETTE, log_axis, new_figure, short
from studies.beyond.section import Row, Section, named, runs
from studies.report import markdown, spread

BASELINES = (("do_acp", "adamw-16"), ("do_acp", "adamw-4"))


def section(out: Path) -> Section | None:
    """Of the arms `seed_S/arms/INIT.TRAINING.STEPS`; unfinished ones are left out."""
    rows = []
    for folder, row in runs(out, "seed_*/arms/*"):
        init, training = named(folder)
        rows.append({"seed": int(folder.parents[1].name.removeprefix("seed_")), "init": init, "training": training, **row})
    return Section(rows, f"{_table(rows)}\n\n{_reached(rows)}".rstrip(), _figure(rows)) if rows else None


def _keys(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Arms, the baselines first."""
    return sorted({(row["init"], row["training"]) for row in rows}, key=lambda key: (key not in BASELINES, key))


def _of(rows: Sequence[Row], key: tuple[str, str]) -> list[Row]:
    return sorted((row for row in rows if (row["init"], row["training"]) == key), key=lambda row: (row["tokens"], row["seed"]))


def _table(rows: Sequence[Row]) -> str:
    """KL to the MoE after so many tokens, mean and spread over seeds."""
    budgets = sorted({row["tokens"] for row in rows})
    body = []
    for key in _keys(rows):
        found = [[row["kl"] for row in _of(rows, key) if row["tokens"] == tokens] for tokens in budgets]
        body.append([*key, *(spread(values, 4) if values else "" for values in found), max(map(len, found))])
    return markdown(["init", "training", *(f"{tokens / 1e6:.2f}M tokens" for tokens in budgets), "seeds"], body)


def tokens_to(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Tokens at which (tokens, KL) points reach a KL, straight between them in logarithms; None: beyond the last."""
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= wanted <= high:
            share = (math.log(high) - math.log(wanted)) / (math.log(high) - math.log(low))
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None


def _reached(rows: Sequence[Row]) -> str:
    """Tokens that each arm with several budgets needs to the last KL of each baseline, as a share of the baseline's, seed by seed."""
    baselines = [key for key in BASELINES if _of(rows, key)]
    body = []
    for key in _keys(rows):
        shares = [_shares(rows, key, baseline) for baseline in baselines]
        if key not in BASELINES and any(shares):
            body.append([*key, *(f"{spread(found, 3)} ({len(found)})" if found else "" for found in shares)])
    return markdown(["init", "training", *(f"of {', '.join(key)} (seeds)" for key in baselines)], body) if body else ""


def _shares(rows: Sequence[Row], key: tuple[str, str], baseline: tuple[str, str]) -> list[float]:
    goals, found = _of(rows, baseline), []
    last = goals[-1]["tokens"]
    for goal in (row for row in goals if row["tokens"] == last):
        own = [(row["tokens"], row["kl"]) for row in _of(rows, key) if row["seed"] == goal["seed"]]
        tokens = tokens_to(own, goal["kl"])
        found += [tokens / last] if tokens is not None else []
    return found


def _figure(rows: Sequence[Row]) -> Figure:
    """KL over tokens of the baselines and of the arms with several budgets; each point is a run of its own, with its whole schedule."""
    figure = new_figure(7.5, 4.5)
    axes = figure.add_subplot()
    shown = [key for key in _keys(rows) if key in BASELINES or len({row["tokens"] for row in _of(rows, key)}) > 1]
    for place, key in enumerate(shown):
        own = _of(rows, key)
        budgets = sorted({row["tokens"] for row in own})
        color = PALETTE[place % len(PALETTE)]
        means = [statistics.mean(row["kl"] for row in own if row["tokens"] == tokens) for tokens in budgets]
        axes.plot(budgets, means, "-" if len(budgets) > 1 else "o", color=color, label=", ".join(key))
        axes.plot([row["tokens"] for row in own], [row["kl"] for row in own], "o", color=color, alpha=0.6)
    axes.set_xscale("log")
    budgets = sorted({row["tokens"] for key in shown for row in _of(rows, key)})
    axes.set_xticks(budgets, [short(tokens) for tokens in budgets])
    axes.minorticks_off()
    log_axis(axes)
    axes.set_xlabel("distillation tokens of the run")
    axes.set_ylabel("KL to the MoE [nats/token]")
    axes.grid(axis="y")
    axes.legend()
    return figure
