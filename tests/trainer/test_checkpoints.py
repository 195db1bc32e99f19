"""Checkpoints: written behind the training, resumed in another layout, and refused when they are not what was written."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
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
from megatron_moe2dense.trainer import distill, loop
from megatron_moe2dense.trainer.checkpoints.writer import complete, latest
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

pytestmark = pytest.mark.slow

STEPS, SAVED, LENGTH = 6, 3, 16
TP2, PP2, DP2, WHOLE = {"tensor": 2}, {"pipeline": 2}, {}, {"distributed_optimizer": False}
# Layout that saved (two processes), that resumes, its processes. A checkpoint's tensors are whole ones, so each way to write them and
# each way to read them is enough.
RESHARDED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "TP2 to PP2": (TP2, PP2, 2),
    "PP2 to DP2 distributed optimizer": (PP2, DP2, 2),
    "DP2 distributed optimizer to TP2": (DP2, TP2, 2),
    "DP2 distributed optimizer to TP1": (DP2, {}, 1),
    "Muon, TP2 to PP2": ({**TP2, **WHOLE}, {**PP2, **WHOLE}, 2),
    "Muon, DP2 to TP2": (WHOLE, {**TP2, **WHOLE}, 2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_qwen3(root / "student", seed=2)
    tiny_qwen3_moe(root / "moe", seed=3)
    write_tokens(root / "tokens", LENGTH * 4 * STEPS + 1)
    return root


def config(root: Path, output: str, parallel: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    train = {"steps": STEPS, "save_every": SAVED, "log_every": 1000, **settings.pop("train", {})}
    return {
        "student": str(root / "student"),
        "teacher": None,
        "output": str(root / output),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH},
        "optim": {"lr": 1e-3},
        "parallel": parallel or {},
        "batch": {"micro": 2, "global": 4},
        "train": train,
        "dtype": "float32",
        **settings,
    }


def run(settings: dict[str, Any]) -> Path:
    distill.run(build(DistillConfig, settings, "the test"))
    return Path(settings["output"])


def back_to(output: Path, step: int) -> Path:
    """As if the finished run had been stopped right after that checkpoint."""
    for path in complete(output / "checkpoints"):
        if path.name > f"step_{step:08d}":
            shutil.rmtree(path)
    manifest = output / "moe2dense.json"
    manifest.write_text(manifest.read_text().replace('"status": "finished"', '"status": "unfinished"'))
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    target = output.parent / f"{output.name} exported"
    export.run(build(ExportConfig, {"checkpoint": str(output), "output": str(target), "dtype": "float32"}, "the test"))
    return load_file(target / "model.safetensors")


def export_once(output: Path) -> Path:
    target = output.parent / f"{output.name} exported"
    if not target.exists():
        weights(output)
    return target / "model.safetensors"


@pytest.fixture(scope="module")
def straight(root: Path) -> Path:
    return run(config(root, "straight"))


@pytest.fixture(scope="module")
def straight_muon(root: Path) -> Path:
    return run(case_config(root, "Muon, straight", WHOLE))


def case_config(root: Path, case: str, parallel: dict[str, Any]) -> dict[str, Any]:
    return config(root, case, parallel, optim={"lr": 1e-3, "muon": {} if "Muon" in case else None})


@pytest.fixture
def stopped(root: Path) -> dict[str, Any]:
    """Config of a run with checkpoints at steps 2 and 4, stopped after the latter."""
    settings = config(root, "stopped", train={"save_every": 2, "keep": 5})
    output, kept = Path(settings["output"]), root / "stopped as it was"
    if not kept.exists():
        shutil.copytree(back_to(run(settings), 4), kept)
    shutil.rmtree(output)
    shutil.rmtree(root / "stopped exported", ignore_errors=True)
    shutil.copytree(kept, output)
    return settings


@pytest.fixture(scope="module")
def resharded(root: Path, straight: Path) -> dict[str, Path]:
    """Every run begun in its first layout, and its second half run again in the other."""
    outputs = {name: case_config(root, name, begun) for name, (begun, _, _) in RESHARDED.items()}
    launch(2, "tests.trainer.cases:distill_all", [*outputs.values(), moe_student(root, expert=2)])
    back_to(root / "moe run", SAVED)
    for settings in outputs.values():
        back_to(Path(settings["output"]), SAVED)
    for processes in (1, 2):
        changed = [case_config(root, name, ended) for name, (_, ended, count) in RESHARDED.items() if count == processes]
        launch(processes, "tests.trainer.cases:distill_all", changed)
    return {name: Path(settings["output"]) for name, settings in outputs.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("case", RESHARDED)
def test_a_run_resumed_in_another_layout_goes_on_as_one_that_was_never_stopped(
    case: str, resharded: dict[str, Path], straight: Path, straight_muon: Path
):
    straight = straight_muon if "Muon" in case else straight
    found, expected = (records.read(output / "metrics.jsonl") for output in (resharded[case], straight))
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-5), name
    ours, theirs = weights(resharded[case]), load_file(export_once(straight))
    for name, weight in theirs.items():
        assert torch.linalg.vector_norm(ours[name] - weight) / torch.linalg.vector_norm(weight) < 1e-5, name


def moe_student(root: Path, expert: int) -> dict[str, Any]:
    return config(root, "moe run", {"expert": expert}, student=str(root / "moe"))


@pytest.mark.distributed
def test_a_moe_student_does_not_change_its_expert_parallel_size(resharded: dict[str, Path], root: Path):
    with pytest.raises(UserError, match=r"was written with parallel[.]expert=2") as refused:
        run(moe_student(root, expert=1))
    assert refused.value.do == "set parallel.expert=2"


def test_the_two_optimizers_do_not_resume_each_other(stopped: dict[str, Any]):
    with pytest.raises(UserError, match=r"was written with parallel[.]distributed_optimizer=true"):
        run({**stopped, "parallel": {"distributed_optimizer": False}})


@pytest.mark.distributed
def test_random_states_are_each_ranks_own_and_come_back_exactly(root: Path):
    drawn = launch(2, "tests.trainer.run_cases:random_numbers", config(root, "random", TP2), config(root, "random", DP2))
    assert drawn["straight"] == drawn["resumed"]
    assert drawn["straight"][0] != drawn["straight"][1]
    assert drawn["other layout"] != drawn["straight"]


def damage(path: Path, how: str) -> None:
    victim = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    if how == "cut off":
        victim.write_bytes(content[:-1])
    elif how == "one bit flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif how == "a file missing":
        victim.unlink()
    elif how == "no checksums":
        (path / "files.json").unlink()
    else:
        (path / "files.json").write_text("{")


@pytest.mark.parametrize("how", ["cut off", "one bit flipped", "a file missing", "no checksums", "cut checksums"])
def test_a_damaged_checkpoint_is_refused(how: str, stopped: dict[str, Any]):
    output = Path(stopped["output"])
    newest = output / "checkpoints" / "step_00000004"
    damage(newest, how)
    with pytest.raises(UserError, match="step_00000004") as refused:
        run(stopped)
    assert f"remove {newest}; the same command then continues from step_00000002" in refused.value.do
    with pytest.raises(UserError, match="step_00000004"):
        weights(output)


def test_without_a_damaged_checkpoint_the_one_before_it_goes_on(stopped: dict[str, Any], straight: Path):
    output = Path(stopped["output"])
    damage(output / "checkpoints" / "step_00000004", "cut off")
    shutil.rmtree(output / "checkpoints" / "step_00000004")
    run(stopped)
    expected = load_file(export_once(straight))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())


def test_the_only_checkpoint_damaged_means_starting_over(stopped: dict[str, Any]):
    back_to(Path(stopped["output"]), 2)
    damage(Path(stopped["output"]) / "checkpoints" / "step_00000002", "cut off")
    with pytest.raises(UserError) as refused:
        run(stopped)
    assert "starts from step 0" in refused.value.do


def test_a_checkpoint_of_another_model_is_refused(stopped: dict[str, Any], root: Path, tmp_path: Path):
    shutil.copytree(root / "student", tmp_path / "kept")
    try:
        tiny_qwen3(root / "student", seed=2, intermediate_size=64)
        with pytest.raises(UserError, match=r"another config \(student: "):
            run(stopped)
        begun = run(config(root, "narrow", train={"save_every": 4, "keep": 5}))
        newest = Path(stopped["output"]) / "checkpoints" / "step_00000004"
        shutil.rmtree(back_to(begun, 4) / "checkpoints" / newest.name)
        shutil.copytree(newest, begun / "checkpoints" / newest.name)
        with pytest.raises(UserError, match=r"mlp.linear_fc2.weight is \[4, 64, 128\], in the student's model \[4, 64, 64\]"):
            run(config(root, "narrow", train={"save_every": 4, "keep": 5}))
    finally:
        shutil.rmtree(root / "student")
        shutil.copytree(tmp_path / "kept", root / "student")
    assert latest(Path(stopped["output"]) / "checkpoints") is not None


def full_disk(name: str) -> Callable[[int], None]:
    """An fsync that finds no room for one of a checkpoint's files."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    return fsync


@pytest.mark.parametrize(("behind", "writer"), [(True, 0), (False, -1)])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(behind: bool, writer: int, stopped: dict[str, Any], straight: Path):
    settings = {**stopped, "train": {**stopped["train"], "async_save": behind}}
    file = sorted(path.name for path in (Path(settings["output"]) / "checkpoints" / "step_00000002").glob("*.distcp"))[writer]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full_disk(file))
        with pytest.raises(UserError, match=r"step_00000006 could not be written: .*No space left on device"):
            run(settings)
    checkpoints = Path(settings["output"]) / "checkpoints"
    assert [path.name for path in complete(checkpoints)] == ["step_00000002", "step_00000004"]
    run(settings)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004", "step_00000006"]
    expected = load_file(export_once(straight))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(Path(settings["output"])).items())


def test_a_read_only_disk_is_a_user_error(stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).endswith(".tmp"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(UserError, match="Read-only file system"):
        run(stopped)


def test_training_goes_on_while_one_checkpoint_is_written(root: Path, straight: Path, monkeypatch: pytest.MonkeyPatch):
    """With a disk that is slower than the steps: never two in flight, each complete in the end, and of its own step."""
    settings = config(root, "behind", train={"save_every": 2, "keep": 5})
    checkpoints, real, seen = Path(settings["output"]) / "checkpoints", os.fsync, []

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".distcp":
            time.sleep(0.5)
        real(descriptor)

    advance = loop.Trainer.advance

    def watched(trainer: loop.Trainer, state: Any) -> float | None:
        seen.append((state.step, sorted(path.name[:13] for path in checkpoints.glob("*.tmp"))))
        return advance(trainer, state)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(loop.Trainer, "advance", watched)
    run(settings)
    assert seen == [(0, []), (1, []), *((step, [f"step_{step // 2 * 2:08d}"]) for step in range(2, STEPS))]
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step_00000002", "step_00000004", "step_00000006"]
    monkeypatch.undo()
    back_to(checkpoints.parent, 2)
    run(settings)
    expected = load_file(export_once(straight))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(checkpoints.parent).items())
