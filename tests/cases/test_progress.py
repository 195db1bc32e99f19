"""What long stages say while they run: every command, on the pico model, as if each of its stages took minutes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_moe2dense.cli import main

pytestmark = pytest.mark.slow

TOKENS = "{path: %s, sequence_length: 64, sequences: 4}"
LAYERS = 4


@pytest.fixture(scope="module")
def statistics(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    main(["calibrate", f"source={example}/model", f"output={folder}/statistics", f"data={TOKENS % (example / 'tokens/distill')}"])
    return folder / "statistics"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command whose stages all count as long; what it said, a list of lines."""
    monkeypatch.setattr("megatron_moe2dense.common.progress.QUIET", 0.0)
    monkeypatch.setattr("megatron_moe2dense.common.progress._APART", 0.0)
    # transformers reads the variable that a command sets when it is imported, which here it was before
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)

    def run(*arguments: str) -> list[str]:
        capsys.readouterr()
        main(list(arguments))
        text = capsys.readouterr().err
        assert "\r" not in text
        return text.splitlines()

    return run


def lines(found: list[str], doing: str, unit: str) -> list[str]:
    """Of one stage: all have a clock time and a rate, and time left or taken."""
    counted = rf"\d\d-\d\d \d\d:\d\d:\d\d I {doing}: [\d,.]+/[\d,.]+ {unit}, .*/.*, (ETA|took) \w+"
    return [line for line in found if re.fullmatch(counted, line)]


def test_a_user_waits_for_the_surgery(said, example: Path, statistics: Path, tmp_path: Path):
    """a long calibrate, select, convert or refit: a line for each layer, with the rate and the time left"""
    source, data = f"source={example}/model", f"data={TOKENS % (example / 'tokens/distill')}"
    for_plan = [source, f"statistics={statistics}"]
    assert len(lines(said("calibrate", source, f"output={tmp_path}/statistics", data), "calibrate", "layers")) == LAYERS
    assert len(lines(said("select", *for_plan, f"output={tmp_path}/neurons", data), "select", "layers")) == LAYERS
    assert len(lines(said("convert", *for_plan, f"output={tmp_path}/dense"), "write", "parts")) == LAYERS + 1
    for mode in ("parallel", "sequential"):
        found = said("convert", *for_plan, f"output={tmp_path}/{mode}", data, f"refit.mode={mode}")
        assert len(lines(found, "refit", "layers")) == LAYERS
    pruned = said(
        "prune-dense", f"source={tmp_path}/dense", f"output={tmp_path}/pruned", data, "target={hidden_size: 96, intermediate_size: 64}"
    )
    assert len(lines(pruned, "calibrate", "layers")) == LAYERS
    assert lines(pruned, "write", "parts")


def test_a_user_waits_for_the_search(said, example: Path, statistics: Path, tmp_path: Path):
    """a long sweep or auto: a line for each layer of the teacher and of the models in a pass, and the best plan after each pass"""
    common = [f"source={example}/model", f"statistics={statistics}", f"data={TOKENS % (example / 'tokens/heldout')}"]
    swept = said("sweep", *common, f"output={tmp_path}/sweep", "grid={score: [sf, random], keep: [4], group: [anchor]}")
    assert len(lines(swept, "teacher", "layers")) == LAYERS
    assert len(lines(swept, r"\d dense models?", "layers")) == LAYERS
    assert any(re.search(r"sweep: (\d)/\1 plans, \d+s; best .*: KL \d", line) for line in swept)
    more = [f"refit_data={TOKENS % (example / 'tokens/distill')}", "grid={score: [sf], keep: [4], group: [anchor]}", "halvings=1"]
    chosen = said("auto", *common, f"output={tmp_path}/auto", *more)
    assert len(lines(chosen, "select", "layers")) == LAYERS
    assert any(re.search(r"round 1 of 2: \d+ models to judge on 1/", line) for line in chosen)


def test_a_user_waits_for_text_and_for_an_evaluation(said, example: Path, tmp_path: Path):
    """a long data, eval or cache-teacher: MB/s, windows/s or samples/s beside tokens/s, and the time left"""
    text = tmp_path / "text.txt"
    text.write_text("a few words\n\n" * 2000)
    made = said("data", f"source={text}", f"tokenizer={example}/model", f"output={tmp_path}/tokens")
    assert len(lines(made, "tokenise", "MB")) == 1
    assert "MB/s, " in made[-1]
    assert "tokens/s, took" in made[-1]
    model, heldout = f"models=[{example}/model]", f"perplexity.data={TOKENS % (example / 'tokens/heldout')}"
    judged = said("eval", model, f"output={tmp_path}/records.jsonl", heldout)
    assert "tokens/s" in lines(judged, "model", "windows")[-1]
    cached = ["data={path: %s, sequence_length: 64}" % (example / "tokens/distill"), "samples=4", "shard_samples=2", "k=8"]
    found = said("cache-teacher", f"teacher={example}/model", f"output={tmp_path}/cache", *cached, "device=cpu")
    assert "tokens/s" in lines(found, "cache", "samples")[-1]


def test_a_user_waits_for_a_distillation(said, example: Path, statistics: Path, tmp_path: Path):
    """a long distill: the clock time, `step 120/7629, ETA 4h52`, loss and tokens/s, for the first step and every ten"""
    main(["convert", f"source={example}/model", f"statistics={statistics}", f"output={tmp_path}/dense"])
    run = [f"student={tmp_path}/dense", f"teacher={example}/model", f"output={tmp_path}/run", "device=cpu", "dtype=float32"]
    data = "data={path: %s, sequence_length: 64}" % (example / "tokens/distill")
    found = said("distill", *run, data, "batch={micro: 1, global: 2}", "train={steps: 5, log_every: 2}")
    steps = [match for line in found if (match := re.match(r"\d\d-\d\d \d\d:\d\d:\d\d I step (\d)/5(, ETA \w+)?: loss \d", line))]
    assert [(match[1], bool(match[2])) for match in steps] == [("1", False), ("2", True), ("4", True), ("5", False)]
