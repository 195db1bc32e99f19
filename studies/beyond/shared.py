"""A MoE with a shared expert: its down projection kept, or solved with the others."""

from __future__ import annotations

from pathlib import Path

from studies.beyond.section import Section, evaluated, runs
from studies.report import markdown


def section(out: Path) -> Section | None:
    """Cross-entropy before, KL before and after distillation of `shared/runs/NAME`.

    Raises:
        KeyError: a model was not distilled.
    """
    records, after = out / "shared/initial.jsonl", {folder.name: row for folder, row in runs(out, "shared/runs/*")}
    if not records.exists():
        return None
    found = evaluated(records)
    rows = [{"model": model, **row, "distilled": None if model == "moe" else after[model]} for model, row in found.items()]
    body = [
        [row["model"], f"{row['nll']:.3f}", f"{row['kl']:.4f}", f"{row['distilled']['kl']:.4f}" if row["distilled"] else ""] for row in rows
    ]
    return Section(rows, markdown(["model", "cross-entropy [nats]", "KL", "KL after distillation"], body))
