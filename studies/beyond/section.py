"""What every part of docs/beyond.md is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.report import lines

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """rows: for beyond_records.jsonl. text: tables, in Markdown. figure: for images/, None: without one."""

    rows: list[Row]
    text: str
    figure: Figure | None = None


def ended(folder: Path) -> Row | None:
    """The last evaluation of a run of distill; None where it has not come to it."""
    file = folder / "metrics.jsonl"
    last = lines(file)[-1] if file.exists() else {}
    return {"tokens": last["tokens"], "kl": last["eval_kl"], "nll": last["eval_loss"]} if last.get("eval_kl") is not None else None


def runs(out: Path, folders: str) -> list[tuple[Path, Row]]:
    """All finished runs of a pattern of folders, by name."""
    found = [(folder, ended(folder)) for folder in sorted(out.glob(folders))]
    return [(folder, row) for folder, row in found if row is not None]


def named(folder: Path) -> tuple[str, str]:
    """(init, training) of a folder INIT.TRAINING.STEPS."""
    init, training = folder.name.rpartition(".")[0].split(".", 1)
    return init, training


def evaluated(path: Path) -> dict[str, Row]:
    """Records of `eval` by model: cross-entropy [nats/token] and KL to the MoE."""
    return {row["model"]: {"nll": row["metrics"]["nll"], "kl": row["metrics"]["kl"]} for row in lines(path)}
