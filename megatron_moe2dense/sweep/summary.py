"""What a sweep says: the best of every axis, each axis' main effect with spread, and the share of the variance it explains (analysis of
variance). No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_moe2dense.common.label import label
from megatron_moe2dense.common.table import render

Row = dict[str, Any]
METRICS = ("kl", "nll")
AXES: dict[str, Callable[[Row], str]] = {
    "keep": lambda row: str(row["config"]["keep"]),
    "groups": lambda row: str(row["config"]["groups"]),
    "score": lambda row: label(row["config"]["score"]),
    "group": lambda row: label(row["config"]["group"]),
    "scale": lambda row: label(row["config"]["scale"]),
    "refit": lambda row: label(row["config"].get("refit")),
}


def summarise(rows: Sequence[Row], configurations: int) -> dict[str, Any]:
    """The content of summary.json. rows: the records, all configurations of the grid or those that are there; at least one."""
    assert rows, "a sweep that evaluated nothing has no summary"
    evaluated = [row for row in rows if "same_plan_as" not in row]
    return {
        "format": 1,
        "configurations": configurations,
        "recorded": len(rows),
        "distinct_plans": len(evaluated),
        "teacher": rows[0]["teacher"],
        "best": {metric: _short(min(rows, key=lambda row: row["metrics"][metric])) for metric in METRICS},
        "axes": {name: _axis(rows, value) for name, value in AXES.items()},
        "variance_explained": {metric: variance_explained(rows, metric) for metric in METRICS},
        "variance_explained_by_keep": {
            keep: {metric: variance_explained([row for row in rows if AXES["keep"](row) == keep], metric) for metric in METRICS}
            for keep in dict.fromkeys(map(AXES["keep"], rows))
        },
        "pareto": [_short(row) for row in pareto(evaluated)],
    }


def variance_explained(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """By axis: the sum of squares between its values' means over the total, 0 to 1 (eta squared). In a complete grid these are orthogonal
    and `interactions` is what is left; where combinations are missing it is not given."""
    values_N = np.array([row["metrics"][metric] for row in rows], np.float64)
    total = float(((values_N - values_N.mean()) ** 2).sum())
    shares, sizes = {}, []
    for name, value in AXES.items():
        labels = np.array([value(row) for row in rows])
        means = {one: values_N[labels == one].mean() for one in dict.fromkeys(labels)}
        sizes.append(len(means))
        between = float(sum((labels == one).sum() * (mean - values_N.mean()) ** 2 for one, mean in means.items()))
        if len(means) > 1:
            shares[name] = between / total if total > 0 else 0.0
    if len(rows) == np.prod(sizes):
        shares["interactions"] = max(0.0, 1.0 - sum(shares.values())) if total > 0 else 0.0
    return shares


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats in both parameters and perplexity, smallest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["parameters"], row["metrics"]["perplexity"])):
        if not front or row["metrics"]["perplexity"] < front[-1]["metrics"]["perplexity"]:
            front.append(row)
    return front


def _axis(rows: Sequence[Row], value: Callable[[Row], str]) -> dict[str, Any]:
    return {one: _effect([row for row in rows if value(row) == one]) for one in dict.fromkeys(map(value, rows))}


def _effect(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean and spread (standard deviation) over all points with one value of an axis, and the best of them by KL."""
    found: dict[str, Any] = {"configurations": len(rows)}
    for metric in METRICS:
        values_N = np.array([row["metrics"][metric] for row in rows])
        found[metric] = {"mean": float(values_N.mean()), "spread": float(values_N.std())}
    return {**found, "best": _short(min(rows, key=lambda row: row["metrics"]["kl"]))}


def _short(row: Row) -> Row:
    return {"model": row["model"], "plan_hash": row["plan_hash"], "parameters": row["parameters"], **row["metrics"]}


def summary_table(summary: dict[str, Any]) -> str:
    """For stdout: a line for every value of every axis, then the shares of the variance."""
    body = []
    for axis, values in summary["axes"].items():
        for value, effect in values.items() if len(values) > 1 else ():
            kl, nll, best = effect["kl"], effect["nll"], effect["best"]
            body.append([axis, value, kl["mean"], kl["spread"], nll["mean"], nll["spread"], best["kl"], best["perplexity"], best["model"]])
    header = ["axis", "value", "KL [nats]", "spread", "nll [nats]", "spread", "best KL", "its perplexity", "best configuration"]
    best, teacher = summary["best"]["kl"], summary["teacher"]
    head = f"best: {best['model']}, KL {best['kl']:.4f} nats, perplexity {best['perplexity']:.2f} (teacher {teacher['perplexity']:.2f})"
    parts = [head, *([render(header, body)] if body else [])]
    if shares := summary["variance_explained"]["kl"]:
        by_keep = summary["variance_explained_by_keep"]
        rows = [["all", *_shares(shares, shares)], *([f"K={keep}", *_shares(found["kl"], shares)] for keep, found in by_keep.items())]
        columns = [*shares]
        parts += ["share of the variance of KL between configurations that each axis explains:", render(["points", *columns], rows)]
    return "\n\n".join(parts)


def _shares(found: dict[str, float], columns: dict[str, float]) -> list[float | None]:
    return [found.get(name) for name in columns]
