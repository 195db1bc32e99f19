"""What a run stands on gives way: the disk fills up in the middle of a file, its output can not be written, /dev/shm is full, its text
is deleted, the clock jumps back. Each is told, nothing that was finished is lost, and the same command ends like a run in which nothing
happened."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense import cli
from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.trainer import distill, loop
from megatron_moe2dense.trainer.cache import write as cache
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.checkpoints.writer import Writer
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.semaphores import no_semaphores
from tests.helpers.tiny_models import tiny_qwen3, write_tokens
from tests.trainer.runs import TIMED, alone

pytestmark = pytest.mark.slow

STEPS, LENGTH = 6, 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("surroundings")
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", LENGTH * 4 * STEPS + 1)
    (root / "file").write_text("in the way")
    return root


def config(root: Path, output: str, **settings: Any) -> dict[str, Any]:
    return alone(root, output, train={"steps": STEPS, "save_every": 2}, **settings)


def run(settings: dict[str, Any]) -> Path:
    distill.run(build(DistillConfig, settings, "the test"))
    return Path(settings["output"])


def rows(output: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in records.read(output / "metrics.jsonl")]


def exported(output: Path) -> dict[str, torch.Tensor]:
    target = output.with_name(f"{output.name} exported")
    if not target.exists():
        export.run(build(ExportConfig, {"checkpoint": str(output), "output": str(target)}, "the test"))
    return load_file(target / "model.safetensors")


def assert_equal(output: Path, straight: Path) -> None:
    assert rows(output) == rows(straight)
    found, expected = exported(output), exported(straight)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def straight(root: Path) -> Path:
    return run(config(root, "straight"))


@contextlib.contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The kernel refuses what would make a file larger, in the middle of a write: a disk of real bytes that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_in_a_row_of_metrics_costs_no_step_before_the_last_checkpoint(
    root: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
):
    append, calls = records.append, itertools.count(1)

    def full(path: Path, row: dict[str, Any]) -> None:
        room = path.stat().st_size + 20 if next(calls) == 4 else resource.RLIM_INFINITY
        with largest_file(room):
            append(path, row)

    monkeypatch.setattr(records, "append", full)
    settings = config(root, "full disk")
    with pytest.raises(UserError, match=r"metrics\.jsonl: File too large") as refused:
        run(settings)
    assert "free space" in refused.value.do
    monkeypatch.undo()
    assert [row["step"] for row in rows(root / "full disk")] == [1, 2, 3]
    run(settings)
    assert_equal(root / "full disk", straight)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_checkpoints_are_written_where_processes_can_share_no_semaphore(
    code: int, root: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
):
    no_semaphores(monkeypatch, code)
    assert_equal(run(config(root, f"no semaphores {code}")), straight)


def test_a_checkpoint_without_semaphores_says_when_the_disk_is_full(root: Path, monkeypatch: pytest.MonkeyPatch):
    no_semaphores(monkeypatch)
    write, room = Writer.start, 20_000

    def full(*arguments: Any) -> None:
        with largest_file(room):  # the fork inherits it
            write(*arguments)

    monkeypatch.setattr(Writer, "start", full)
    with pytest.raises(UserError, match=r"step_00000002 could not be written: .*File too large"):
        run(config(root, "no semaphores, full disk"))


def test_an_export_to_a_full_disk_leaves_no_model_and_is_done_by_the_same_command(root: Path, straight: Path):
    target = root / "full export"
    settings = build(ExportConfig, {"checkpoint": str(straight), "output": str(target)}, "the test")
    with largest_file(20_000), pytest.raises(UserError, match=r"model\.safetensors: File too large"):
        export.run(settings)
    assert not target.exists()
    export.run(settings)
    found, expected = load_file(target / "model.safetensors"), exported(straight)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_teacher_cache_goes_on_where_the_disk_was_full(root: Path):
    settings = {
        "teacher": str(root / "student"),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH},
        "k": 8,
        "samples": 8,
        "shard_samples": 4,
        "teacher_check": {"loss_bound": None, "stock_forward": "never"},
        "dtype": "float32",
    }
    for name, limit in (("whole cache", resource.RLIM_INFINITY), ("full cache", 2_500)):
        asked = build(CacheTeacherConfig, {**settings, "output": str(root / name)}, "the test")
        if limit == 2_500:
            with largest_file(limit), pytest.raises(UserError, match=r"shard_00000\.safetensors.*File too large"):
                cache.run(asked)
            assert not (root / name).exists()
        cache.run(asked)
    for shard in ("shard_00000.safetensors", "shard_00001.safetensors"):
        assert (root / "whole cache" / shard).read_bytes() == (root / "full cache" / shard).read_bytes()


@pytest.mark.parametrize("command", ["distill", "export", "cache-teacher"])
def test_an_output_that_can_not_be_written_is_a_user_error(command: str, root: Path, straight: Path, capsys: pytest.CaptureFixture[str]):
    """Below a file: nobody may write there, root neither."""
    inputs = {
        "distill": [
            f"student={root / 'student'}",
            "teacher=null",
            f"data.path={root / 'tokens'}",
            "train.steps=1",
            "batch.global=4",
            "dtype=float32",
        ],
        "export": [f"checkpoint={straight}"],
        "cache-teacher": [f"teacher={root / 'student'}", f"data.path={root / 'tokens'}", "k=8", "samples=4", "dtype=float32"],
    }
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *inputs[command], *(["data.sequence_length=16"] if command != "export" else []), f"output={root}/file/out"])
    assert stop.value.code == 2
    assert "Not a directory" in capsys.readouterr().err


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], None]) -> None:
    advance = loop.Trainer.advance

    def watched(trainer: loop.Trainer, state: Any) -> float | None:
        norm = advance(trainer, state)
        if state.step == step:
            happens()
        return norm

    monkeypatch.setattr(loop.Trainer, "advance", watched)


def test_text_that_is_deleted_during_a_run_does_not_cost_the_run(root: Path, straight: Path, monkeypatch: pytest.MonkeyPatch):
    for suffix in (".bin", ".idx"):
        shutil.copy(root / f"tokens{suffix}", root / f"fleeting{suffix}")

    def vanish() -> None:
        for suffix in (".bin", ".idx"):
            (root / f"fleeting{suffix}").unlink()

    after_step(monkeypatch, 3, vanish)
    settings = config(root, "deleted", data={"path": str(root / "fleeting"), "sequence_length": LENGTH})
    assert_equal(run(settings), straight)
    manifests = [json.loads((root / name / "moe2dense.json").read_text()) for name in ("deleted", "straight")]
    assert [manifest["status"] for manifest in manifests] == ["finished", "finished"]
    assert manifests[0]["data"] == manifests[1]["data"]


def test_a_run_whose_text_is_gone_is_not_resumed_and_goes_on_when_it_is_back(root: Path, straight: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(root, "stopped")

    def stop() -> None:
        raise KeyboardInterrupt

    after_step(monkeypatch, 3, stop)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    monkeypatch.undo()
    (root / "tokens.bin").rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"no file .*tokens\.bin"):
        run(settings)
    (root / "elsewhere").rename(root / "tokens.bin")
    run(settings)
    assert_equal(root / "stopped", straight)


def test_a_clock_that_jumps_back_changes_nothing(root: Path, straight: Path, monkeypatch: pytest.MonkeyPatch):
    now = itertools.count(time.time(), -86_400.0)
    monkeypatch.setattr(time, "time", lambda: next(now))
    run(config(root, "clock"))
    monkeypatch.undo()
    assert_equal(root / "clock", straight)
    assert all(0 < row["step_seconds"] < 600 for row in records.read(root / "clock/metrics.jsonl"))
