"""The script that writes the study's tables: every number from a record, the verdict from the seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studies import study_report
from tests.helpers.distributed import ROOT


def record(model: str, kl: float) -> dict[str, Any]:
    metrics = {"kl": kl, "perplexity": 100 * kl, "accuracy": {"continuation": 1 - kl}}
    return {"model": model, "parameters": 1000, "metrics": metrics}


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three seeds, better in the paper's order by 0.1 an arm, but for `sf` and `d2d` in two of them."""
    out = tmp_path / "out"
    write(out / "teachers.jsonl", record("moe", 0.0), record("dense", 0.05))
    for seed in (0, 1, 2):
        order = list(study_report.ARMS)
        if seed:
            order[1], order[2] = order[2], order[1]
        write(out / f"seed_{seed}/records.jsonl", *(record(arm, 0.1 * (place + 1)) for place, arm in enumerate(order)))
        write(out / f"seed_{seed}/own_teacher.jsonl", record("d2d", 0.0625))
        for arm in order:
            steps = [{"step": 1, "tokens": 64, "step_seconds": 2.5}, {"step": 2, "tokens": 128, "step_seconds": 1.5}]
            write(out / f"seed_{seed}/{arm}/run/metrics.jsonl", *steps, {"step": 2, "tokens": 128, "eval_loss": 4.0})
    (tmp_path / "study.md").write_text(f"before\n{study_report.BEGIN}\nstale\n{study_report.END}\nafter\n")
    return out


def test_tables_hold_the_means_and_spreads_of_the_records(study: Path, tmp_path: Path):
    study_report.main(study, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    first = "| DO-ACP, K = G | **0.1000 ± 0.0000** | **10.00 ± 0.00** | **90.0 ± 0.0** | 0.1000 ± 0.0000 | 4 ± 0 | 58.10 |"
    assert first in text
    assert "| D2D: pruned dense teacher | 0.2333 ± 0.0577 | 23.33 ± 5.77 | 76.7 ± 5.8 | 0.0625 ± 0.0000 | 4 ± 0 | 51.84 |" in text
    rows = [json.loads(line) for line in (tmp_path / "study_records.jsonl").read_text().splitlines()]
    assert len(rows) == 2 + 3 * len(study_report.ARMS)
    assert rows[2]["curve"] == [[128, 4.0]]
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"study_quality.png", "study_training.png"}


def test_the_verdict_counts_seeds_for_every_pair_of_neighbours(study: Path):
    lines = study_report.verdict(study_report.collect(study)[1]).splitlines()
    assert "| do_acp before sf | holds, 3 of 3 seeds | holds, 3 of 3 seeds | holds, 3 of 3 seeds |" in lines
    assert any(line.startswith("| sf before d2d | does not hold, 1 of 3 seeds |") for line in lines)


def test_the_paper_averages_are_those_of_the_method():
    recipe = (ROOT / "launch/reproduce_qwen3_30b_a3b.sh").read_text()
    for arm in ("do_acp", "sf", "random_ffn"):
        assert f"{study_report.ARMS[arm][1]:.2f}" in recipe


def test_an_unfinished_study_or_a_document_without_markers_is_an_error(study: Path, tmp_path: Path):
    (study / "seed_1/sf/run/metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        study_report.main(study, tmp_path / "study.md")
    (tmp_path / "study.md").write_text("no markers")
    with pytest.raises(ValueError, match="does not have the lines"):
        study_report.main(study, tmp_path / "study.md")
    (tmp_path / "other/teachers.jsonl").parent.mkdir()
    write(tmp_path / "other/teachers.jsonl", record("moe", 0.0))
    with pytest.raises(ValueError, match="no seed"):
        study_report.collect(tmp_path / "other")
