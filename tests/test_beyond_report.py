"""The script that writes the tables of docs/beyond.md: every number from a record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import beyond_report as script
from launch.report import lines
from megatron_moe2dense.common import records


def evaluated(model: str, nll: float) -> dict[str, Any]:
    return {"model": model, "parameters": 1000, "metrics": {"nll": nll, "kl": nll - 3.0}}


def arm(folder: Path, tokens: int, kl: float) -> None:
    folder.mkdir(parents=True)
    records.rewrite(folder / "metrics.jsonl", [{"step": 1, "tokens": tokens, "eval_kl": kl, "eval_loss": kl + 3.0}])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Every refit takes a quarter of what is left; the arms of the recipe reach at a quarter of the tokens what the baseline reaches."""
    out = tmp_path / "out"
    out.mkdir()
    rows = [evaluated("moe", 3.0)]
    for place, choice in enumerate(script.CHOICES):
        rows += [evaluated(choice + refit, 3.0 + 2.0 * 0.75**number - 0.1 * place) for number, refit in enumerate(script.REFITS)]
    records.rewrite(out / "initial.jsonl", rows)
    for seed in (0, 1):
        for init, name in (("do_acp", "adamw"), ("ols-long", "muon")):
            for steps, kl in ((100, 0.4), (400, 0.2)):
                folder = out / f"seed_{seed}/arms/{init}.{name}.{steps}"
                arm(folder, steps * 4096, kl * (1.0 if init == "do_acp" else 0.5) + 0.01 * seed)
    arm(out / "seed_0/tune/do_acp.adamw-4.5e-3.150", 614400, 0.3)
    markers = [*script.INITIAL, *script.TUNED, *script.DISTILLED]
    (tmp_path / "beyond.md").write_text("before\n" + "\nstale\n".join(markers) + "\nafter\n")
    return out


def test_tables_hold_the_records(out: Path, tmp_path: Path):
    script.main(out, tmp_path / "beyond.md")
    text = (tmp_path / "beyond.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| DO-ACP experts, uniform (paper) | 5.000 (0%) | 4.500 (25%) | 4.125 (44%) | 3.844 (58%) |" in text
    assert "| do_acp | adamw-4.5e-3 | 614k | 0.3000 |" in text
    assert "| do_acp | adamw | 0.4050 ± 0.0071 | 0.2050 ± 0.0071 | 2 |" in text
    assert "| ols-long | muon | 0.250 ± 0.000 | 2 |" in text, "0.2 at a quarter of the tokens"
    kinds = [set(row) for row in lines(tmp_path / "beyond_records.jsonl")]
    assert len(kinds) == 17 + 1 + 8
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"beyond_initial.png", "beyond_distilled.png"}


def test_without_arms_the_first_table_alone_is_written(out: Path, tmp_path: Path):
    for seed in (0, 1):
        shutil.rmtree(out / f"seed_{seed}/arms")
    script.main(out, tmp_path / "beyond.md")
    text = (tmp_path / "beyond.md").read_text()
    assert "stale" in text.split(script.DISTILLED[0])[1]
    assert "5.000 (0%)" in text


def test_tokens_lie_straight_between_runs_in_logarithms():
    points = [(1e5, 0.4), (4e5, 0.1)]
    assert script.tokens_to(points, 0.2) == pytest.approx(2e5)
    assert script.tokens_to(points, 0.05) is None


def test_a_document_without_markers_is_an_error(out: Path, tmp_path: Path):
    (tmp_path / "beyond.md").write_text("no markers")
    with pytest.raises(ValueError, match="does not have the lines"):
        script.main(out, tmp_path / "beyond.md")
    assert json.loads((out / "initial.jsonl").read_text().splitlines()[0])["model"] == "moe"
