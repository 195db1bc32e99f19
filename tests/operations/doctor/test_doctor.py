"""`moe2dense doctor`: the report of this machine, and of configs that fit it or do not."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_moe2dense import cli
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.operations.doctor import machine, readiness, run
from megatron_moe2dense.operations.doctor.config import DoctorConfig
from megatron_moe2dense.operations.doctor.machine import Gpu
from megatron_moe2dense.operations.doctor.readiness import Resources, judge
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.tiny_models import tiny, write_tokens

GPU = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, 79 * 2**30, (9, 0), "570.1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    """A teacher, a student with a tokenizer, and one without."""
    root = tmp_path_factory.mktemp("doctor")
    tiny("qwen3_moe", root / "teacher")
    tiny("qwen3", root / "student")
    shutil.copytree(root / "student", root / "bare")
    shutil.copyfile(tokenizer_directory / "tokenizer.json", root / "student" / "tokenizer.json")
    write_tokens(root / "tokens", 2000)
    return root


def content(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "student": str(root / "student"),
        "teacher": str(root / "teacher"),
        "output": str(root / "run"),
        "data": {"path": str(root / "tokens"), "sequence_length": 32},
        "batch": {"micro": 1, "global": 4},
        "train": {"steps": 2},
        "dtype": "float32",
        **changes,
    }


def judged(root: Path, resources: Resources | None = None, **changes: Any) -> dict[str, Any]:
    findings = judge(build(DistillConfig, content(root, **changes), "the test"), resources or Resources([], None))
    return {item.name: item for item in findings}


def test_a_config_that_runs_here_has_nothing_wrong(root: Path, capsys: pytest.CaptureFixture[str]):
    file = root / "distill.yaml"
    file.write_text(str(content(root)))
    cli.main(["doctor", str(file)])
    report = capsys.readouterr().out
    assert "nothing wrong" in report
    for words in ("gloo", "plain PyTorch", "torch AdamW", "alltoall", "CUDA graphs    off", "psutil", "tensor 1 x pipeline 1"):
        assert words in report
    assert not dist.is_initialized()
    assert not (root / "run").exists(), "nothing is written"


def test_what_would_stop_a_run_ends_in_exit_code_2_and_all_is_named(root: Path, capsys: pytest.CaptureFixture[str]):
    file = root / "distill.yaml"
    file.write_text(str(content(root, student=str(root / "bare"))))
    with pytest.raises(SystemExit) as error:
        cli.main(["doctor", str(file), "processes=3", "settings=[parallel.tensor=2, train.steps=1000]"])
    captured = capsys.readouterr()
    assert error.value.code == 2
    assert "3 processes" in captured.err
    assert "62 samples of 32 tokens" in captured.err
    assert "<- error" in captured.out
    assert "no tokenizer files  <- warning" in captured.out, "a run without goes, its exports can not be used as they are"


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"student": "none"}, "student", "No such file"),
        ({"teacher": "none"}, "teacher", "No such file"),
        ({"device": "cuda"}, "device", "no CUDA device"),
        ({"data": {"path": "none", "sequence_length": 32}}, "text", "none"),
        ({"train": {"steps": 1000}}, "text", "62 samples of 32 tokens"),
        ({"batch": {"micro": 3, "global": 4}}, "batch", "batch.global=4"),
        ({"dtype": "bfloat16", "fp8": {}}, "fp8", "without Transformer Engine"),
    ],
)
def test_what_a_config_lacks_is_named(changes: dict[str, Any], name: str, words: str, root: Path):
    item = judged(root, **changes)[name]
    assert (item.level, words in item.found) == ("error", True), item
    assert item.do


def test_other_vocabularies_are_told_of(root: Path, tmp_path: Path):
    tiny("qwen3_moe", tmp_path / "teacher", vocab_size=96)
    assert "one vocabulary" in judged(root, teacher=str(tmp_path / "teacher"))["vocabulary"].do
    assert "text" in judged(root, student="none", data={"path": "none", "sequence_length": 32}), "one mistake does not hide another"


def test_loggers_that_are_not_installed_are_told_of(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert "wandb" in judged(root, logging={"wandb": {"project": "p"}})["metrics"].found
    assert "tensorboard" in judged(root, logging={"tensorboard": True})["metrics"].found


def test_model_state_beyond_memory_or_disk_is_told_of(root: Path, monkeypatch: pytest.MonkeyPatch):
    rows = judged(root)
    assert {rows["memory"].level, rows["disk"].level} == {"fine"}
    monkeypatch.setattr(readiness, "free_memory", lambda: 1000)
    monkeypatch.setattr(readiness, "free_disk", lambda _path: 1000)
    rows = judged(root)
    assert (rows["memory"].level, rows["disk"].level) == ("error", "error")
    crowded = Gpu(GPU.name, GPU.total, 1000, GPU.capability, GPU.driver)
    assert "fullest GPU" in judged(root, Resources([GPU, crowded], 2))["memory"].found


def test_processes_are_those_asked_for_then_torchruns_then_the_gpus(root: Path, monkeypatch: pytest.MonkeyPatch):
    wide: dict[str, Any] = {"parallel": {"tensor": 2, "expert": 2}}
    assert judged(root, **wide)["processes"].found.startswith("2: tensor 2")
    assert judged(root, Resources([GPU], None), **wide)["processes"].do.count("processes=N")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert judged(root, **wide)["processes"].found == "3 processes"
    assert judged(root, Resources([], 4), **wide)["processes"].found.endswith("data 2")


def test_gpus_are_read_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81920, 80896, 9.0, 570.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (gpu,) = machine.gpus()
    assert gpu == GPU
    (row,) = machine.torch_on([gpu])
    assert row.level == "warning", "torch for CPUs sees no GPU"
    assert any("sm_90" in item.found for item in machine.machine([gpu], {"NCCL_DEBUG": "INFO"}))
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []


def test_the_environment_that_changes_a_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def found(environment: dict[str, str]) -> dict[str, str]:
        return {item.name: item.found for item in machine.machine([], environment)}

    assert found({"NCCL_DEBUG": "INFO", "PATH": "x"}).get("NCCL_DEBUG") == "INFO"
    assert "PATH" not in found({"PATH": "x"})
    assert found({"HF_HUB_OFFLINE": "1"})["Hugging Face hub"] == "offline"
    monkeypatch.setattr(machine, "version", lambda _name: "1")
    assert "WANDB_API_KEY" in found({"WANDB_API_KEY": "secret"})["wandb"]
    assert "secret" not in str(found({"WANDB_API_KEY": "secret"}))
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.example login user password secret\n")
    assert found({"NETRC": str(netrc)})["wandb"] == "key in the netrc file"
    assert found({"NETRC": str(tmp_path / "none")})["wandb"].startswith("no key")


def test_a_user_without_a_home_has_no_netrc_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "version", lambda _name: "1")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does for a number that no user has
    rows = {item.name: item.found for item in machine.machine([], {})}
    assert rows["wandb"].startswith("no key")


def test_settings_without_a_config_are_refused():
    with pytest.raises(UserError, match="no effect without config"):
        build(DoctorConfig, {"processes": 2}, "the test")


def test_a_dry_run_writes_nothing():
    assert run.dry_run(DoctorConfig())["writes"] == []
