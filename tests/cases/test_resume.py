"""What a user meets who starts a run again: from elsewhere, longer, otherwise, or in place of another."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.trainer import distill, identity
from megatron_moe2dense.trainer.cache import write as cache
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.checkpoints import checkpointer
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.state import TrainState
from tests.helpers.tiny_models import tiny_qwen3
from tests.trainer.runs import TIMED, alone, with_student

pytestmark = pytest.mark.slow

CONSTANT = {"style": "constant", "warmup": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_student(tmp_path_factory.mktemp("resume"))


def config(root: Path, output: str, steps: int, **settings: Any) -> dict[str, Any]:
    train = {"steps": steps, "save_every": 2, "log_every": 1000, **settings.pop("train", {})}
    return alone(root, output, **{"schedule": CONSTANT, "train": train, "optim": {"lr": 1e-2}, **settings})


def run(settings: dict[str, Any]) -> Path:
    distill.run(build(DistillConfig, settings, "the test"))
    return Path(settings["output"])


def begun(settings: dict[str, Any]) -> Path:
    """A run that was stopped after its last step but one save: its manifest says unfinished."""
    output = run(settings)
    manifest = output / "moe2dense.json"
    manifest.write_text(manifest.read_text().replace('"status": "finished"', '"status": "unfinished"'))
    shutil.rmtree(max((output / "checkpoints").glob("step_*")))
    return output


def rows(output: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in records.read(output / "metrics.jsonl")]


def weights(output: Path) -> dict[str, torch.Tensor]:
    target = output.with_name(f"{output.name} exported")
    export.run(build(ExportConfig, {"checkpoint": str(output), "output": str(target), "overwrite": True}, "the test"))
    return load_file(target / "model.safetensors")


def assert_same_run(output: Path, straight: Path) -> None:
    assert [(row["loss"], row["grad_norm"], row["lr"]) for row in rows(output)] == [
        (row["loss"], row["grad_norm"], row["lr"]) for row in rows(straight)
    ]
    found, expected = weights(output), weights(straight)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def straight(root: Path) -> Path:
    return run(config(root, "straight", 6))


@pytest.mark.parametrize("how", ["dots", "relative", "output moved", "inputs copied"])
def test_a_run_goes_on_from_other_paths(how: str, root: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """the same run by other paths (`./x`, relative, output moved, inputs copied elsewhere): it goes on to the same weights"""
    settings = config(root, f"begun {how}", 6)
    output = begun(settings)
    names = {"student": root / "student", "tokens": root / "tokens"}
    if how == "dots":
        names = {name: f"{path.parent}/./{path.name}" for name, path in names.items()}
    elif how == "relative":
        monkeypatch.chdir(root)
        names = {name: path.name for name, path in names.items()}
        settings["output"] = output.name
    elif how == "output moved":
        settings["output"] = str(shutil.move(output, root / "moved"))
    else:
        shutil.copytree(root / "student", tmp_path / "copy")
        for suffix in (".bin", ".idx"):
            shutil.copy(root / f"tokens{suffix}", tmp_path / f"text{suffix}")
        names = {"student": tmp_path / "copy", "tokens": tmp_path / "text"}
    data = {**settings["data"], "path": str(names["tokens"])}
    assert_same_run(run({**settings, "student": str(names["student"]), "data": data}).absolute(), straight)


def test_another_config_is_refused_by_its_keys(root: Path):
    """a run started again with other settings: refused, the keys that differ are named, old and new, and nothing is deleted"""
    settings = config(root, "other settings", 6)
    output = begun(settings)
    before = sorted(output.rglob("*"))
    changed = {**settings, "optim": {"lr": 5e-3}, "train": {**settings["train"], "steps": 4, "seed": 3}}
    with pytest.raises(UserError) as refused:
        run(changed)
    for difference in ("optim.lr: 0.01 -> 0.005", "train.seed: 0 -> 3", "train.steps: 6 -> 4"):
        assert difference in refused.value.found
    assert "schedule" not in refused.value.found
    assert sorted(output.rglob("*")) == before


def test_other_weights_under_the_same_path_are_another_run(root: Path, tmp_path: Path):
    """a student whose files changed under the same path: refused, `student` is named"""
    shutil.copytree(root / "student", tmp_path / "student")
    settings = config(root, "changed student", 6) | {"student": str(tmp_path / "student")}
    begun(settings)
    tiny_qwen3(tmp_path / "student", seed=9)
    with pytest.raises(UserError, match=r"another config \(student: [0-9a-f]{12} -> [0-9a-f]{12}\)"):
        run(settings)


@pytest.mark.parametrize("style", ["constant", "wsd"])
def test_a_finished_run_is_made_longer(style: str, root: Path, straight: Path, caplog: pytest.LogCaptureFixture):
    """a finished run with more `train.steps` (constant; WSD before its decay): it ends like one of that length from the start"""
    schedule = CONSTANT if style == "constant" else {"style": "wsd", "warmup": 0.0, "decay": 0.2, "final": 0.5}
    expected = straight if style == "constant" else run(config(root, "straight wsd", 10, schedule=schedule))
    first, steps = (2, 6) if style == "constant" else (6, 10)
    shorter = config(root, f"longer {style}", first, schedule=schedule)
    output = run(shorter) if style == "constant" else begun(shorter)  # of 6 steps the last decays: stopped after the fourth
    with caplog.at_level(logging.WARNING):
        run(config(root, f"longer {style}", steps, schedule=schedule))
    assert "learning rate goes from" not in caplog.text
    manifest = json.loads((output / "moe2dense.json").read_text())
    assert (manifest["status"], manifest["step"], manifest["lengths"]) == ("finished", steps, [first, steps])
    assert_same_run(output, expected)


def test_a_schedule_that_had_come_down_says_where_it_jumps(root: Path, caplog: pytest.LogCaptureFixture):
    """a finished cosine run with more `train.steps`: it goes on with its optimizer state, and says what the learning rate becomes"""
    cosine = {"style": "cosine", "warmup": 0.0, "final": 0.1}
    run(config(root, "cosine", 4, schedule=cosine))
    with caplog.at_level(logging.WARNING, logger="moe2dense"):
        output = run(config(root, "cosine", 8, schedule=cosine))
    assert "schedule.style cosine becomes one over 8 steps: the learning rate goes from 1.00e-03 to 5.50e-03 there" in caplog.text
    found = [row["lr"] for row in rows(output)]
    assert found[3] == pytest.approx(1e-3)
    assert found[4] == pytest.approx(1e-3 + 9e-3 * (1 + math.cos(5 / 8 * math.pi)) / 2)


def test_the_warm_up_of_the_first_length_stays(root: Path):
    """a run made longer after its warm-up: the warm-up is not stretched over the steps that were added"""
    warm = {"style": "constant", "warmup": 0.5}
    run(config(root, "warm", 4, schedule=warm))
    assert [row["lr"] for row in rows(run(config(root, "warm", 8, schedule=warm)))] == pytest.approx([5e-3, *[1e-2] * 7])


def test_fewer_or_as_many_steps_do_not_start_a_finished_run_again(root: Path, straight: Path):
    """a finished run started with as many steps, or fewer: refused, more `train.steps` are named as the way to go on"""
    for steps in (6, 4):
        with pytest.raises(UserError, match="is a finished output: 6 steps") as refused:
            run(config(root, "straight", steps))
        assert "train.steps above 6" in refused.value.do
    assert straight.exists()


def test_what_replaces_a_run_has_an_id_of_its_own(root: Path):
    """`overwrite=true` over a W&B run: the new run gets a new id, a resumed one keeps its id"""
    settings = config(root, "ids", 2)

    def run_id() -> str:
        return identity.recorded(build(DistillConfig, settings, "the test"))["run_id"]

    begun({**settings, "train": {**settings["train"], "save_every": 1}})
    first = run_id()
    run(settings)
    assert run_id() == first
    run({**settings, "overwrite": True})
    assert run_id() != first


def test_a_run_begun_by_an_earlier_version_goes_on(root: Path, straight: Path):
    """a run whose manifest is of before identities were written: it goes on by its config and the text it recorded"""
    settings = config(root, "earlier", 6)
    manifest = begun(settings) / "moe2dense.json"
    content = json.loads(manifest.read_text())
    for name in ("identity", "run_id", "lengths"):
        del content[name]
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"optim\.lr: 0\.01 -> 0\.5"):
        run({**settings, "optim": {"lr": 0.5}})
    assert_same_run(run(settings), straight)
    assert json.loads(manifest.read_text())["run_id"] == content["config_hash"]


def test_a_checkpoint_of_another_format_or_with_unknown_fields(root: Path, monkeypatch: pytest.MonkeyPatch):
    """a checkpoint of another format, or whose progress has a field that is not known: refused by name, in distill and export"""
    settings = config(root, "format", 4)
    output = begun({**settings, "train": {**settings["train"], "save_every": 2}})
    monkeypatch.setattr(checkpointer, "FORMAT", 2)
    for refused in (lambda: run(settings), lambda: weights(output)):
        with pytest.raises(UserError, match=r"step_00000002: a checkpoint of format 1\nexpected: format 2"):
            refused()
    monkeypatch.undo()
    monkeypatch.setattr(TrainState, "__dataclass_fields__", {n: f for n, f in TrainState.__dataclass_fields__.items() if n != "recent"})
    with pytest.raises(UserError, match="unknown field recent"):
        run(settings)


def test_a_teacher_cache_goes_on_from_other_paths(root: Path, monkeypatch: pytest.MonkeyPatch):
    """an unfinished teacher cache by other paths: it goes on, and other settings are named"""
    settings: dict[str, Any] = {
        "teacher": str(root / "student"),
        "output": str(root / "cache"),
        "data": {"path": str(root / "tokens"), "sequence_length": 16},
        "k": 8,
        "samples": 8,
        "shard_samples": 4,
        "teacher_check": {"loss_bound": None, "stock_forward": "never"},
        "dtype": "float32",
    }
    cache.run(build(CacheTeacherConfig, settings, "the test"))
    whole = {path.name: path.read_bytes() for path in (root / "cache").glob("shard_*")}
    (root / "cache").rename(root / "elsewhere.tmp")
    (root / "elsewhere.tmp" / "shard_00001.safetensors").unlink()
    monkeypatch.chdir(root)
    moved = {**settings, "teacher": "./student", "output": "elsewhere", "data": {"path": "tokens", "sequence_length": 16}}
    with pytest.raises(UserError, match=r"another config \(k: 8 -> 9\)"):
        cache.run(build(CacheTeacherConfig, {**moved, "k": 9}, "the test"))
    cache.run(build(CacheTeacherConfig, moved, "the test"))
    assert {path.name: path.read_bytes() for path in (root / "elsewhere").glob("shard_*")} == whole


def test_a_run_is_begun_on_one_cache_and_goes_on_with_one_of_a_teacher_in_fp8(root: Path):
    """a run from a teacher cache, started again with a cache of the same teacher in FP8: refused, as other numbers come from it"""
    for name, dtype in (("plain", "model"), ("fp8", "fp8")):
        settings: dict[str, Any] = {
            "teacher": {"path": str(root / "student"), "dtype": dtype, "check": {"loss_bound": None, "stock_forward": "never"}},
            "output": str(root / f"cache of {name}"),
            "data": {"path": str(root / "tokens"), "sequence_length": 16},
            "samples": 8,
            "k": 8,
            "dtype": "float32",
        }
        cache.run(build(CacheTeacherConfig, settings, "the test"))
    both = [
        config(root, "on caches", 1, loss={"method": "top_k_kl", "k": 8}, teacher={"cache": str(root / f"cache of {name}")})
        for name in ("plain", "fp8")
    ]
    run(both[0])
    with pytest.raises(UserError, match="teacher_dtype"):
        run({**both[1], "train": {**both[1]["train"], "steps": 2}})
