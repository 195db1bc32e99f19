"""The automatic choice: its plan is one that convert carries out to the KL it promised, found in fewer evaluations than a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.sweep.auto import _Search
from tests.helpers.tiny_models import tiny, write_tokens

pytestmark = pytest.mark.slow

LENGTH = 24
TEXTS = (("data", "heldout", 8), ("refit_data", "distill", 16))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its statistics, calibration and held-out tokens."""
    folder = tmp_path_factory.mktemp("auto")
    tiny("deepseek_v2", folder / "moe", num_hidden_layers=3)
    write_tokens(folder / "text", LENGTH * 8, seed=1)
    write_tokens(folder / "held_out", LENGTH * 16, seed=2)
    data = [f"data.path={folder}/text", f"data.sequence_length={LENGTH}"]
    main(["calibrate", f"source={folder}/moe", f"output={folder}/statistics", *data])
    return folder


def chosen(made: Path, output: Path, *more: str) -> list[str]:
    texts = [f"{name}={{path: {made}/{file}, sequence_length: {LENGTH}}}" for name, file in (("data", "held_out"), ("refit_data", "text"))]
    given = [f"source={made}/moe", f"statistics={made}/statistics", f"output={output}", *texts]
    return ["auto", *given, "grid={score: [sf, do_acp], group: [anchor, round_robin], keep: [2, 4]}", "eta=3", *more]


def test_the_plan_gives_the_divergence_that_was_promised(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main([*chosen(made, tmp_path / "auto"), "--dry-run"])
    foretold = json.loads(capsys.readouterr().out)["rounds"]
    main(chosen(made, tmp_path / "auto"))
    report = json.loads((tmp_path / "auto/auto.json").read_text())
    assert foretold == [{"models": len(each["models"]), "windows": each["windows"]} for each in report["rounds"]]
    assert sorted(path.name for path in (tmp_path / "auto").iterdir()) == ["auto.json", "moe2dense.json", "plan.json"]
    assert [each["windows"] for each in report["rounds"]] == [2, 6, 16]
    assert [len(each["models"]) for each in report["rounds"]] == [8, 2, 2], (
        "6 of the grid and 2 of neurons; a third; the last in both modes"
    )
    best = report["rounds"][-1]["models"][0]
    assert best["kl"] == min(row["kl"] for row in report["rounds"][-1]["models"])
    assert report["model_windows"] == {"spent": 8 * 2 + 2 * 6 + 2 * 16, "all": 8 * 16}
    assert best["model"] in capsys.readouterr().out
    main(["convert", f"source={made}/moe", f"plan={tmp_path}/auto/plan.json", f"output={tmp_path}/dense"])
    data = f"perplexity.data={{path: {made}/held_out, sequence_length: {LENGTH}}}"
    main(["eval", f"models=[{tmp_path}/dense]", f"output={tmp_path}/records.jsonl", data, f"kl.teacher={made}/moe"])
    [row] = records.read(tmp_path / "records.jsonl")
    assert row["metrics"]["kl"] == pytest.approx(best["kl"], rel=1e-5, abs=1e-6)
    assert row["plan_hash"] == best["plan_hash"]


def test_a_killed_search_goes_on_after_its_last_round(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    main(chosen(made, tmp_path / "straight"))
    judged, steps = _Search._judged, []

    def interrupted(self: Any, candidates: Any, step: int) -> dict[str, Any]:
        steps.append(step)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return judged(self, candidates, step)

    monkeypatch.setattr(_Search, "_judged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(chosen(made, tmp_path / "killed"))
    main(chosen(made, tmp_path / "killed"))
    assert steps == [9, 3, 3, 1]
    assert (tmp_path / "killed/plan.json").read_text() == (tmp_path / "straight/plan.json").read_text()


def test_the_best_is_reconstructed_and_that_is_kept_where_it_is_better(example: Path, tmp_path: Path):
    source = [f"source={example}/model", f"statistics={tmp_path}/statistics", "halvings=0", "select=[]", "grid={score: [sf], keep: [4]}"]
    texts = [f"{name}={{path: {example}/tokens/{file}, sequence_length: 256, sequences: {count}}}" for name, file, count in TEXTS]
    main(["calibrate", source[0], f"output={tmp_path}/statistics", texts[1].removeprefix("refit_")])
    for name, settings in (("trained", "{epochs: 6, lr: 6e-3}"), ("spoilt", "{epochs: 1, lr: 1e-12}")):
        main(["auto", *source, *texts, f"output={tmp_path}/{name}", f"reconstruct={settings}"])
    trained, spoilt = (json.loads((tmp_path / name / "auto.json").read_text()) for name in ("trained", "spoilt"))
    best, *others = trained["rounds"][-1]["models"]
    assert "reconstruct" in best["model"]
    assert best["kl"] < others[0]["kl"]
    assert trained["model_windows"]["spent"] == 3 * TEXTS[0][2], "in both modes, and once more"
    assert spoilt["rounds"][-1]["models"][0] == others[0], "of equals the one that was there"
    plan = json.loads((tmp_path / "trained/plan.json").read_text())
    assert plan["refit"]["reconstruct"]["epochs"] == 6
    main(["convert", source[0], f"plan={tmp_path}/trained/plan.json", f"output={tmp_path}/dense"])
    assert json.loads((tmp_path / "dense/moe2dense.json").read_text())["plan_hash"] == best["plan_hash"]


@pytest.mark.parametrize(
    ("budget", "groups"), [("{}", 2), ("{parameters: 180000}", 3), ("{bytes: 700000}", 3), ("{parameters: 10000000}", 8)]
)
def test_the_width_is_the_most_the_budget_has_room_for(
    budget: str, groups: int, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main([*chosen(made, tmp_path / "auto", f"budget={budget}", "grid.keep=null"), "--dry-run"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["groups"] == groups
    assert not (tmp_path / "auto").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("budget.parameters=1000", "with FFNs as wide as one expert"),
        ("budget={parameters: 1, bytes: 1}", "both given"),
        ("grid.groups=[2]", "follows from the budget"),
        ("select=[olss]", "did you mean 'ols'?"),
    ],
)
def test_what_can_not_be_chosen_is_refused(changes: str, message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(chosen(made, tmp_path / "auto", changes))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "auto").exists()
