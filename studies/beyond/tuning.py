"""Learning rates and batch sizes, and the recipe with one thing changed at a time: single runs on a part of the held-out text."""

from __future__ import annotations

from pathlib import Path

from megatron_moe2dense.plots.style import short
from studies.beyond.section import Section, named, runs
from studies.report import markdown

RECIPE = "recipe"


def tuning(out: Path) -> Section | None:
    """Every run of `seed_0/tune/INIT.TRAINING.STEPS`, the best of a start and a budget first."""
    rows = [dict(zip(("init", "training"), named(folder), strict=True)) | row for folder, row in runs(out, "seed_0/tune/*")]
    order = sorted(rows, key=lambda row: (row["tokens"], row["init"], row["kl"]))
    body = [[row["init"], row["training"], short(row["tokens"]), f"{row['kl']:.4f}"] for row in order]
    return Section(rows, markdown(["start", "training", "tokens", "KL"], body)) if rows else None


def factors(out: Path) -> Section | None:
    """Every run of `seed_0/factors/NAME`, the lowest cross-entropy first, KL against the recipe itself.

    Raises:
        StopIteration: the recipe itself is not there.
    """
    rows = [{"factor": folder.name, **row} for folder, row in runs(out, "seed_0/factors/*")]
    if not rows:
        return None
    recipe = next(row["kl"] for row in rows if row["factor"] == RECIPE)
    order = sorted(rows, key=lambda row: row["nll"])
    body = [[row["factor"], f"{row['nll']:.4f}", f"{row['kl']:.4f}", f"{row['kl'] - recipe:+.4f}"] for row in order]
    return Section(rows, markdown(["changed", "cross-entropy", "KL", "difference"], body))
