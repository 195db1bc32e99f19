"""The scripts that write the tables of docs/beyond.md: every number from a record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe2dense import cli
from megatron_moe2dense.common import records
from megatron_moe2dense.surgery.stats import CalibratedStats
from studies.beyond import choices, initial, lasting, report
from studies.report import lines
from tests.helpers.distributed import ROOT


def evaluated(model: str, nll: float) -> dict[str, Any]:
    return {"model": model, "parameters": 1000, "metrics": {"nll": nll, "kl": nll - 3.0}}


def run(folder: Path, tokens: int, kl: float) -> None:
    folder.mkdir(parents=True)
    records.rewrite(folder / "metrics.jsonl", [{"step": 1, "tokens": tokens, "eval_kl": kl, "eval_loss": kl + 3.0}])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "beyond.md").write_text(
        "before\n" + "".join("\nstale\n".join(report.markers(part)) + "\n" for part in report.PARTS) + "after\n"
    )
    return out


def document(out: Path) -> str:
    report.main(out, out.parent / "beyond.md")
    return (out.parent / "beyond.md").read_text()


def part(text: str, name: str) -> str:
    begin, end = report.markers(name)
    return text.split(begin)[1].split(end)[0].strip()


def test_initial(out: Path):
    """Every refit takes a quarter of what is left."""
    rows = [evaluated("moe", 3.0)]
    for place, choice in enumerate(initial.CHOICES):
        rows += [evaluated(choice + refit, 3.0 + 2.0 * 0.75**number - 0.1 * place) for number, refit in enumerate(initial.REFITS)]
    records.rewrite(out / "initial.jsonl", rows)
    text = document(out)
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| DO-ACP experts, uniform (paper) | 5.000 (0%) | 4.500 (25%) | 4.125 (44%) | 3.844 (58%) |" in part(text, "initial")
    assert [file.name for file in (out.parent / "images").iterdir()] == ["beyond_initial.png"]
    assert len(lines(out.parent / "beyond_records.jsonl")) == 17


def test_tuning_and_factors(out: Path):
    run(out / "seed_0/tune/do_acp.adamw-4.5e-3.150", 614400, 0.3)
    run(out / "seed_0/factors/recipe", 614400, 0.2)
    run(out / "seed_0/factors/final_0", 614400, 0.19)
    text = document(out)
    assert "| do_acp | adamw-4.5e-3 | 614k | 0.3000 |" in part(text, "tuning")
    assert part(text, "factors").endswith("| final_0 | 3.1900 | 0.1900 | -0.0100 |\n| recipe | 3.2000 | 0.2000 | +0.0000 |")


def test_lasting(out: Path):
    """The recipe reaches at a quarter of the tokens what the first baseline ends with, and never what the second does."""
    for seed in (0, 1):
        for init, training, factor in (("do_acp", "adamw-16", 1.0), ("do_acp", "adamw-4", 0.1), ("ols-long", "muon-4", 0.5)):
            for steps, kl in ((100, 0.4), (400, 0.2)):
                run(out / f"seed_{seed}/arms/{init}.{training}.{steps}", steps * 4096, kl * factor + 0.01 * seed)
    text = part(document(out), "lasting")
    assert "| do_acp | adamw-16 | 0.4050 ± 0.0071 | 0.2050 ± 0.0071 | 2 |" in text
    assert "| ols-long | muon-4 | 0.250 ± 0.000 (2) |  |" in text
    assert (out.parent / "images/beyond_lasting.png").exists()


def test_automatic(out: Path):
    plans = [{"model": name, "metrics": {"kl": kl}} for name, kl in (("a", 1.0), ("b", 0.5))]
    (out / "auto/sweep").mkdir(parents=True)
    records.rewrite(out / "auto/sweep/records.jsonl", [*plans, {**plans[0], "model": "c", "same_plan_as": "a"}])
    for name, kl, spent in (("experts", 0.505, 20), ("neurons", 0.4, 25)):
        (out / f"auto/{name}").mkdir()
        found = {"windows": 100, "models": [{"model": "b", "kl": kl}]}
        (out / f"auto/{name}/auto.json").write_text(json.dumps({"rounds": [found], "model_windows": {"spent": spent}}))
    text = part(document(out), "automatic")
    assert "| sweep of 2 distinct plans | b | 0.5000 (+0.0%) | 200 (100%) |" in text
    assert "| b | 0.5050 (+1.0%) | 20 (10%) |" in text
    assert "| b | 0.4000 (-20.0%) | 25 (12%) |" in text


def test_shared(out: Path):
    (out / "shared").mkdir()
    records.rewrite(out / "shared/initial.jsonl", [evaluated("moe", 3.0), evaluated("planned", 5.0)])
    run(out / "shared/runs/planned", 100, 0.25)
    assert part(document(out), "shared").endswith("| moe | 3.000 | 0.0000 |  |\n| planned | 5.000 | 2.0000 | 0.2500 |")


def test_a_part_without_results_keeps_its_table_and_its_records(out: Path):
    kept = {"part": "factors", "factor": "recipe", "kl": 0.2}
    records.rewrite(out.parent / "beyond_records.jsonl", [kept, {"part": "tuning", "kl": 0.4}])
    run(out / "seed_0/tune/do_acp.adamw.150", 614400, 0.3)
    assert part(document(out), "factors") == "stale"
    rows = lines(out.parent / "beyond_records.jsonl")
    assert rows[0] == kept
    assert [(row["part"], row["kl"]) for row in rows[1:]] == [("tuning", 0.3)]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """Statistics of the example, all 32 experts of it merged, and four of them."""
    folder = tmp_path_factory.mktemp("choices")
    text = [f"data.path={example}/tokens/distill", "data.sequence_length=128", "data.sequences=16"]
    cli.main(["calibrate", f"source={example}/model", f"output={folder}/seed_0/statistics", *text])
    for name, keep in (("all", 32), ("four", 4)):
        plan = [f"statistics={folder}/seed_0/statistics", f"keep={keep}", "score.method=sf", "group.method=round_robin"]
        plan = plan if keep > 4 else plan[:-1]
        cli.main(
            ["convert", f"source={example}/model", f"output={folder}/seed_0/inits/{name}-parallel", *plan, *text, "refit.mode=parallel"]
        )
    return folder


def test_properties_of_a_choice(chosen: Path):
    statistics, measured = CalibratedStats.open(chosen / "seed_0/statistics"), choices.measures(chosen / "seed_0/statistics")
    everything = choices.properties(chosen / "seed_0/inits/all-parallel", measured)
    assert everything["frequency"] == pytest.approx(1)
    assert everything["coverage"] == pytest.approx(1)
    four = choices.properties(chosen / "seed_0/inits/four-parallel", measured)
    counts = np.stack([layer["selected_count"] for layer in statistics.layers.values()])
    assert four["frequency"] == pytest.approx(float((np.sort(counts)[:, -4:].sum(1) / counts.sum(1)).mean())), "sf keeps the most frequent"
    assert 0 < four["coverage"] < 1
    assert 1 < four["diversity"] < 256
    assert four["residual"] > 0


def test_choices(out: Path, chosen: Path):
    shutil.copytree(chosen, out, dirs_exist_ok=True)
    for name, kl in (("all-parallel", 0.3), ("four-parallel", 0.2)):
        run(out / f"seed_0/choices/{name}", 1000, kl)
    records.rewrite(out / "choices.jsonl", [evaluated("all-parallel", 5.0), evaluated("four-parallel", 4.5)])
    table = part(document(out), "choices").splitlines()
    assert table[2].startswith("| four | parallel |")
    assert table[2].endswith("| 1.500 | 0.2000 |")
    assert table[4].startswith("| *rank correlation* | *2* | *+1.00* | *+1.00* |")
    assert table[4].endswith("| *+1.00* |  |"), "KL before distillation orders them as KL after does"


def test_tokens_lie_straight_between_runs_in_logarithms():
    points = [(1e5, 0.4), (4e5, 0.1)]
    assert lasting.tokens_to(points, 0.2) == pytest.approx(2e5)
    assert lasting.tokens_to(points, 0.05) is None


def test_a_document_without_markers_is_an_error(out: Path):
    (out.parent / "beyond.md").write_text("no markers")
    with pytest.raises(ValueError, match="does not have the lines"):
        document(out)


def test_every_part_has_its_script():
    assert {file.stem for file in (ROOT / "studies/beyond").glob("*.sh")} == {*report.PARTS, "setup"}
