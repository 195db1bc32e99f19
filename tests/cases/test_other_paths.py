"""What a user meets who goes on with an unfinished calibration, conversion, sweep or evaluation from elsewhere, or with other inputs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import content, records
from megatron_moe2dense.evals import evaluate
from megatron_moe2dense.surgery import calibrate as calibration
from megatron_moe2dense.sweep import run as sweeps
from tests.helpers.tiny_models import tiny_qwen3

TEXT = "path: {place}/text, sequence_length: 16, sequences: 4"


@pytest.fixture(scope="module")
def there(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text and its statistics."""
    place = tmp_path_factory.mktemp("there")
    shutil.copytree(example / "model", place / "moe")
    for end in (".bin", ".idx"):
        shutil.copy(example / f"tokens/distill{end}", place / f"text{end}")
    main(["calibrate", *inputs(place), f"output={place}/statistics"])
    return place


def inputs(place: str | Path) -> list[str]:
    return [f"source={place}/moe", f"data={{{TEXT.format(place=place)}}}"]


def elsewhere(there: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> str:
    """How the same inputs are called then."""
    monkeypatch.chdir(folder)
    if way == "relative":
        return os.path.relpath(there, folder)
    shutil.copytree(there, folder / "copy")
    return str(folder / "copy")


def stopped(monkeypatch: pytest.MonkeyPatch, module: object, name: str, after: int, command: list[str]) -> None:
    """Run it; interrupted in that function's call number `after`."""
    whole: Callable[..., object] = getattr(module, name)
    calls = iter(range(1000))

    def interrupted(*arguments: object, **options: object) -> object:
        if next(calls) == after:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(command)


@pytest.mark.parametrize("way", ["relative", "copied"])
def test_a_calibration_goes_on_from_other_paths(there: Path, tmp_path: Path, monkeypatch, capsys, way: str):
    """a killed `calibrate` begun again with its inputs under other paths, and its output moved: it goes on where it was"""
    stopped(monkeypatch, calibration, "require_finite", 2, ["calibrate", *inputs(there), f"output={tmp_path}/begun"])
    (tmp_path / "begun.tmp").rename(tmp_path / "moved.tmp")
    place = elsewhere(there, tmp_path, monkeypatch, way)
    main(["calibrate", *inputs(place), f"output={tmp_path}/moved"])
    assert "resumed after 1 layers" in capsys.readouterr().err
    assert (tmp_path / "moved/stats.safetensors").read_bytes() == (there / "statistics/stats.safetensors").read_bytes()


def test_a_calibration_is_begun_again_with_other_text(there: Path, tmp_path: Path, monkeypatch, user_error):
    """a killed `calibrate` begun again when other text lies under the same path: refused by that key; nothing deleted"""
    shutil.copytree(there, tmp_path / "here")
    stopped(monkeypatch, calibration, "require_finite", 2, ["calibrate", *inputs(tmp_path / "here"), f"output={tmp_path}/out"])
    for end in (".bin", ".idx"):
        shutil.copy(Path(__file__).parents[2] / f"examples/pico_moe/tokens/heldout{end}", tmp_path / f"here/text{end}")
    assert "another config (data.path: " in user_error("calibrate", *inputs(tmp_path / "here"), f"output={tmp_path}/out")
    assert (tmp_path / "out.tmp/resume").is_dir()


def test_a_sweep_goes_on_from_other_paths(there: Path, tmp_path: Path, monkeypatch, user_error):
    """a killed `sweep` begun again with its inputs under other paths: it goes on; with another grid: refused by the keys that differ"""

    def command(place: str | Path, grid: str = "{keep: [4], score: [pp, sf]}") -> list[str]:
        return ["sweep", *inputs(place), f"statistics={place}/statistics", f"output={tmp_path}/sweep", f"grid={grid}"]

    stopped(monkeypatch, sweeps, "_conclude", 0, command(there))
    rows = (tmp_path / "sweep/records.jsonl").read_bytes()
    place = elsewhere(there, tmp_path, monkeypatch, "copied")
    assert "another config (grid.score" in user_error(*command(place, "{keep: [4], score: [pp]}"))
    main(command(place))
    assert (tmp_path / "sweep/records.jsonl").read_bytes() == rows
    assert json.loads((tmp_path / "sweep/moe2dense.json").read_text())["status"] == "finished"


def test_an_evaluation_goes_on_from_other_paths(there: Path, tmp_path: Path, monkeypatch, user_error):
    """a killed `eval` begun again with models and text under other paths: measured models are kept; with other text: refused by name"""

    def command(place: str | Path, sequences: int = 4) -> list[str]:
        models = f"models={{one: {place}/moe, other: {place}/moe}}"
        text = TEXT.format(place=place).replace("sequences: 4", f"sequences: {sequences}")
        return ["eval", models, f"output={tmp_path}/records.jsonl", f"perplexity.data={{{text}}}"]

    stopped(monkeypatch, evaluate, "_quality", 1, command(there))
    [first] = records.read(tmp_path / "records.jsonl")
    place = elsewhere(there, tmp_path, monkeypatch, "copied")
    assert "perplexity.data.sequences: 4 -> 3" in user_error(*command(place, 3))
    main(command(place))
    rows = records.read(tmp_path / "records.jsonl")
    assert rows[0] == first
    assert [row["model"] for row in rows] == ["one", "other"]


def test_what_an_earlier_version_began_goes_on(there: Path, tmp_path: Path, monkeypatch, capsys):
    """a killed run of a version whose manifests held the config alone: it goes on"""
    command = ["calibrate", *inputs(there), f"output={tmp_path}/out"]
    stopped(monkeypatch, calibration, "require_finite", 2, command)
    manifest = tmp_path / "out.tmp/moe2dense.json"
    kept = json.loads(manifest.read_text())
    del kept["identity"]
    manifest.write_text(json.dumps({**kept, "config_hash": "of another kind"}))
    main(command)
    assert "resumed after 1 layers" in capsys.readouterr().err


def test_a_fingerprint_is_of_content(tmp_path: Path):
    """a folder of inputs that was copied: it is the same by its files' names, lengths and bytes, whatever lies in folders below it"""
    for name in ("a", "b"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(bytes(range(256)) * 8192)
    (tmp_path / "b/deeper/more").write_text("x")
    first, second = (content.fingerprint(str(tmp_path / name)) for name in ("a", "b"))
    assert first == second
    (tmp_path / "b/file").rename(tmp_path / "b/other")
    assert content.fingerprint(str(tmp_path / "b")) != first
    with (tmp_path / "a/file").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    assert content.fingerprint(str(tmp_path / "a")) != first
    assert content.fingerprint(str(tmp_path / "none")) is None


@pytest.mark.parametrize("command", ["calibrate", "prune-dense", "export", "distill", "sweep", "cache-teacher", "convert"])
@pytest.mark.parametrize("where", ["is", "lies around"])
def test_an_output_is_what_is_read(there: Path, tmp_path: Path, user_error, command: str, where: str):
    """an output that is, or lies around, something that is read, with overwrite=true: refused, nothing deleted"""
    shutil.copytree(there, tmp_path / "all")
    if command == "prune-dense":
        shutil.rmtree(tmp_path / "all/moe")
        tiny_qwen3(tmp_path / "all/moe", vocab_size=2048)
    output = tmp_path / "all" / ("moe" if where == "is" else "")
    text = f"data={{path: {tmp_path}/all/text, sequence_length: 16}}"
    read = {
        "calibrate": inputs(tmp_path / "all"),
        "prune-dense": [f"source={tmp_path}/all/moe", text, "target={hidden_size: 64}"],
        "export": [f"checkpoint={tmp_path}/all/moe"],
        "distill": [f"student={tmp_path}/all/moe", "teacher=null", text, "batch={micro: 1, global: 1}", "train.steps=1"],
        "sweep": [*inputs(tmp_path / "all"), f"statistics={tmp_path}/all/statistics", "grid={keep: [4], score: [pp]}"],
        "cache-teacher": [f"teacher={tmp_path}/all/moe", text, "k=4"],
        "convert": [f"source={tmp_path}/all/moe", f"statistics={tmp_path}/all/statistics"],
    }[command]
    before = sorted(tmp_path.rglob("*"))
    said = user_error(command, *read, f"output={output}", "overwrite=true")
    assert f"output {output} {where} " in said
    assert sorted(tmp_path.rglob("*")) == before


def test_another_commands_output_is_not_overwritten(there: Path, tmp_path: Path, user_error):
    """overwrite=true where another command's output is: refused by that command, nothing deleted"""
    shutil.copytree(there / "statistics", tmp_path / "statistics")
    settings = [f"source={there}/moe", f"statistics={there}/statistics", f"output={tmp_path}/statistics", "overwrite=true"]
    assert "is output of `calibrate`" in user_error("convert", *settings)
    assert (tmp_path / "statistics/stats.safetensors").exists()


def test_an_evaluation_that_can_not_begin_leaves_the_rows_that_are_there(there: Path, tmp_path: Path, user_error):
    """`eval overwrite=true` with a task that is not there: refused, and the finished records stay; done well, they are replaced"""

    def command(*more: str) -> list[str]:
        return ["eval", f"models=[{there}/moe]", f"output={tmp_path}/r.jsonl", f"perplexity.data={{{TEXT.format(place=there)}}}", *more]

    main(command())
    before = (tmp_path / "r.jsonl").read_bytes()
    user_error(*command("harness.tasks=[none.yaml]", "overwrite=true"))
    assert (tmp_path / "r.jsonl").read_bytes() == before
    main(command("overwrite=true", "perplexity.batch_tokens=16"))
    [row] = records.read(tmp_path / "r.jsonl")
    assert row["config"]["perplexity"]["batch_tokens"] == 16


def test_a_task_file_is_what_it_asks(tmp_path: Path):
    """a task file under another path, and one whose questions have changed: the same evaluation, and another one"""
    (tmp_path / "a.jsonl").write_text("{}\n")
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text(f"task: t\ndataset_kwargs: {{data_files: {{test: {tmp_path}/a.jsonl}}}}\n")
    asked = [content.identity({"harness": {"tasks": [str(tmp_path / name)]}}) for name in ("one.yaml", "two.yaml")]
    assert asked[0] == asked[1]
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    assert content.identity({"harness": {"tasks": [str(tmp_path / "one.yaml")]}}) != asked[0]
    assert content.identity({"harness": {"tasks": ["hellaswag"]}}) == {"harness": {"tasks": ["hellaswag"]}}
