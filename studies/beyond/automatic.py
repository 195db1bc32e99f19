"""`auto` against the sweep of the same plans: what each found, and how much it evaluated."""

from __future__ import annotations

import json
from pathlib import Path

from studies.beyond.section import Section
from studies.report import lines, markdown

SEARCHES = {"experts": "`auto`, plans of experts", "neurons": "`auto`, plans of neurons too, the best reconstructed"}


def section(out: Path) -> Section | None:
    """Of `auto/sweep` and `auto/SEARCH`. An evaluation is one model on one held-out window.

    Raises:
        OSError: a search is missing.
    """
    file = out / "auto/sweep/records.jsonl"
    if not file.exists():
        return None
    plans = [row for row in lines(file) if "same_plan_as" not in row]
    reports = {name: json.loads((out / f"auto/{name}/auto.json").read_text()) for name in SEARCHES}
    windows = reports["experts"]["rounds"][-1]["windows"]
    best = min(plans, key=lambda row: row["metrics"]["kl"])
    rows = [{"search": "sweep", "model": best["model"], "kl": best["metrics"]["kl"], "evaluations": len(plans) * windows}]
    for name, report in reports.items():
        found = report["rounds"][-1]["models"][0]
        rows.append({"search": name, "model": found["model"], "kl": found["kl"], "evaluations": report["model_windows"]["spent"]})
    whole = rows[0]
    body = [
        [
            SEARCHES.get(row["search"], f"sweep of {len(plans)} distinct plans"),
            row["model"],
            f"{row['kl']:.4f} ({row['kl'] / whole['kl'] - 1:+.1%})",
            f"{row['evaluations']:,} ({row['evaluations'] / whole['evaluations']:.0%})",
        ]
        for row in rows
    ]
    return Section(rows, markdown(["search", "best", "KL to the MoE", "evaluations"], body))
