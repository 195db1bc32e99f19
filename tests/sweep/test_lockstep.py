"""Models whose layers hand more to each other than hidden states: commands that run layers one by one refuse them before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery import select
from megatron_moe2dense.sweep import auto
from megatron_moe2dense.sweep import run as sweep
from tests.families.every import tiny_checkpoint
from tests.helpers.tiny_models import write_tokens

SAID = ("layers of glm_moe_dsa hand more to each other than hidden states", "refit.mode=parallel")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its statistics and tokens."""
    folder = tmp_path_factory.mktemp("lockstep")
    tiny_checkpoint(folder / "moe", "glm_moe_dsa")
    write_tokens(folder / "text", 16 * 10, vocab=128)
    main(["calibrate", f"source={folder}/moe", f"output={folder}/statistics", f"data.path={folder}/text", "data.sequence_length=16"])
    return folder


def given(made: Path, output: Path) -> list[str]:
    return [f"source={made}/moe", f"statistics={made}/statistics", f"output={output}"]


def text(made: Path, *names: str) -> list[str]:
    return [f"{name}={{path: {made}/text, sequence_length: 16}}" for name in names]


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("command", ["auto", "sweep", "convert"])
def test_they_are_refused_before_any_work(
    command: str, more: list[str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def work(*_arguments: Any) -> None:
        raise AssertionError("work before the refusal")

    monkeypatch.setattr(auto, "make_plans", work)
    monkeypatch.setattr(sweep, "make_plans", work)
    monkeypatch.setattr(select, "run", work)
    names = {"auto": ("data", "refit_data"), "sweep": ("data",), "convert": ("data",)}[command]
    refit = ["refit.method=ridge"] if command == "convert" else []
    with pytest.raises(SystemExit) as caught:
        main([command, *given(made, tmp_path / "out"), *text(made, *names), *refit, *more])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert all(part in said for part in SAID)
    assert not (tmp_path / "out").exists()


def test_what_the_refusal_says_to_do_works(made: Path, tmp_path: Path):
    main(["convert", *given(made, tmp_path / "dense"), *text(made, "data"), "refit.method=ridge", "refit.mode=parallel"])
    assert (tmp_path / "dense/model.safetensors").exists()
