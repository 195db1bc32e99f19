"""`moe2dense init`: what a user gets for a MoE, its text and the GPUs, and that it runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_moe2dense import cli
from megatron_moe2dense.cli import main
from megatron_moe2dense.common import config as configs
from megatron_moe2dense.common import records
from megatron_moe2dense.init.sizes import sizes_of, validation
from tests.cases.shell import on_path, texts

COMMANDS = ("data", "calibrate", "convert", "distill", "export", "eval")


@pytest.fixture
def project(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands, with a model and text."""
    (tmp_path / "pico").symlink_to(example / "model")
    texts(tmp_path / "texts", documents=40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `init` says with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(["init", "pico", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_user_has_a_model_text_and_gpus(project: Path, capsys: pytest.CaptureFixture[str]):
    """`init` with 32 H100: commented YAMLs that their commands take, with a layout of 32 that `plan` takes too, and a run.sh"""
    main(["init", "pico", "text=texts", "hardware.gpu=H100", "hardware.gpus=32", "sequence_length=128"])
    folder = project / "out/pico"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f"{name}.yaml" for name in COMMANDS), "run.sh"])
    for name in COMMANDS:
        text = (folder / f"{name}.yaml").read_text()
        assert text.startswith(f"# moe2dense {name}\n# ")
        configs.load(cli._load(cli.COMMANDS[name].config), folder / f"{name}.yaml", [])
    assert "32 x H100" in capsys.readouterr().out
    (project / "out/pico/dense").mkdir()
    (project / "out/pico/dense/config.json").write_text(
        (project / "pico/config.json").read_text()
    )  # of the same sizes, as far as plan goes
    main(["plan", "out/pico/distill.yaml", "hardware.gpu=H100", "hardware.nodes=4"])
    assert "32 x H100" in capsys.readouterr().out
    assert yaml.safe_load((folder / "distill.yaml").read_text())["data"]["sequence_length"] == 128
    assert os.access(folder / "run.sh", os.X_OK)
    subprocess.run(["bash", "-n", folder / "run.sh"], check=True)


def test_a_user_calls_init_twice(project: Path, capsys: pytest.CaptureFixture[str]):
    """`init` where its files are already: refused, nothing replaced; `overwrite=true` replaces them and leaves results alone"""
    main(["init", "pico", "text=texts", "hardware.gpus=1"])
    (project / "out/pico/convert.yaml").write_text("mine")
    (project / "out/pico/tokens.json").write_text("{}")
    assert "existing out/pico/calibrate.yaml" in refused(capsys, "text=texts", "hardware.gpus=1")
    assert (project / "out/pico/convert.yaml").read_text() == "mine"
    main(["init", "pico", "text=texts", "hardware.gpus=1", "overwrite=true"])
    assert (project / "out/pico/convert.yaml").read_text() != "mine"
    assert (project / "out/pico/tokens.json").read_text() == "{}"


def test_a_user_has_too_little_text(project: Path, capsys: pytest.CaptureFixture[str]):
    """`init` with less text than two steps take: refused with the number of tokens, nothing written"""
    texts(project / "few", documents=1)
    assert "tokens of text" in refused(capsys, "text=few", "hardware.gpus=64")
    assert not (project / "out").exists()


def test_a_user_names_a_file_as_output(project: Path, capsys: pytest.CaptureFixture[str]):
    """`init output=FILE`: refused, the file stays as it is"""
    (project / "file").write_text("mine")
    assert "a folder that can be made" in refused(capsys, "text=texts", "hardware.gpus=1", "output=file")
    assert (project / "file").read_text() == "mine"


def test_a_user_gives_gpus_that_are_no_nodes(project: Path, capsys: pytest.CaptureFixture[str]):
    """`hardware.gpus=12`: refused, as a node has at most 8 GPUs; `hardware.gpus=32` is 4 nodes of 8"""
    assert "a node has at most 8" in refused(capsys, "text=texts", "hardware.gpus=12")


@pytest.mark.parametrize(("estimated", "ranks"), [(100_000, 2), (10_000_000, 8), (10_000_000_000, 32), (10_000_000_000, 512)])
def test_a_user_has_text_of_some_length(estimated: int, ranks: int):
    """any amount of text in `init`: whole batches of what the text surely has, 500 steps or more where it suffices, 4B tokens at most"""
    sizes = sizes_of(estimated, 1024, 4_000_000_000, ranks)
    assert sizes.tokens % (sizes.batch * sizes.length) == 0
    assert sizes.batch % ranks == 0
    assert sizes.tokens + sizes.spare * sizes.length <= 0.9 * estimated
    assert sizes.tokens <= 4_000_000_000
    read = validation(sizes, ranks)
    assert read is None or (read % ranks == 0 and read <= sizes.spare)
    if estimated > 1e9:
        assert sizes.tokens > 3.9e9
        assert sizes.batch == max(256, ranks)
        assert read == max(64, ranks)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_user_runs_what_init_wrote(project: Path):
    """run.sh of `init`, from whatever folder: every step runs; started again, all is kept"""
    main(["init", "pico", "text=texts", "hardware.gpus=2", "sequence_length=64", "tokens=2048"])
    environment, script = on_path(project / "bin"), project / "out/pico/run.sh"
    done = subprocess.run([script], cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["model"]: row["metrics"] for row in records.read(project / "out/pico/records.jsonl")}
    assert rows["distilled"]["kl"] < rows["dense"]["kl"]
    assert list((project / "out/pico/figures").glob("*.png"))
    before = (project / "out/pico/run/metrics.jsonl").read_bytes()
    (project / "bin/torchrun").write_text("#!/bin/sh\nexit 9\n")  # nothing is calibrated or trained again
    again = subprocess.run([script], cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (project / "out/pico/run/metrics.jsonl").read_bytes() == before
