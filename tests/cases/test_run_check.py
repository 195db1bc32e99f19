"""What a user meets who asks about a run before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense import cli
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

pytestmark = pytest.mark.slow

LENGTH = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student with 3 KV heads, text, and a YAML of a run that goes."""
    root = tmp_path_factory.mktemp("run check")
    tiny_qwen3_moe(root / "teacher", num_key_value_heads=3, num_attention_heads=6)
    tiny_qwen3(root / "student", num_key_value_heads=3, num_attention_heads=6)
    write_tokens(root / "tokens", LENGTH * 64 + 1)
    content: dict[str, Any] = {
        "student": str(root / "student"),
        "teacher": str(root / "teacher"),
        "output": str(root / "run"),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH},
        "batch": {"micro": 1, "global": 8},
        "train": {"steps": 2},
        "dtype": "bfloat16",
    }
    (root / "distill.yaml").write_text(str(content))
    return root


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that ends in exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    return said


def asked(root: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> dict[str, str]:
    """What doctor, the dry run and the run say of the same config."""
    file = str(root / "distill.yaml")
    found = {
        "doctor": refused(capsys, "doctor", file, f"settings={json.dumps(settings)}"),
        "dry run": refused(capsys, "distill", file, *settings, "--dry-run"),
        "run": refused(capsys, "distill", file, *settings),
    }
    assert not (root / "run").exists()
    return found


def test_three_kv_heads_on_four_tensor_parallel_ranks(root: Path, capsys: pytest.CaptureFixture[str]):
    """`parallel.tensor=4` with 3 KV heads: doctor, `--dry-run` and `plan` name the heads of both models, exit 2"""
    arguments = [str(root / "distill.yaml"), "parallel.tensor=4"]
    said = [
        refused(capsys, "doctor", arguments[0], "settings=[parallel.tensor=4]"),
        refused(capsys, "distill", *arguments, "--dry-run"),
        refused(capsys, "plan", *arguments),
    ]
    for message in said:
        assert message.count("parallel.tensor: 4 with num_key_value_heads = 3") == 2, message


def test_validation_text_that_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]):
    """a `data.validation` whose file is not there: doctor, `--dry-run` and the run name the file, nothing is written"""
    for message in asked(root, capsys, f"data.validation={root}/nothing").values():
        assert f"no file {root}/nothing.idx" in message


def test_a_hundred_times_more_tokens_than_there_are(root: Path, capsys: pytest.CaptureFixture[str]):
    """`train.tokens` beyond the text: doctor, `--dry-run` and the run say how many samples there are and how many are needed"""
    for message in asked(root, capsys, f"train={{tokens: {100 * 64 * LENGTH}}}").values():
        assert "64 samples of 32 tokens in 1 pass(es)" in message
        assert "6400 samples, its share of the run" in message


def test_several_mistakes_at_once(root: Path, capsys: pytest.CaptureFixture[str]):
    """a config with three mistakes: all three are named at once, with what to do about each"""
    settings = (f"data.validation={root}/nothing", "train={steps: 1000}", "batch={micro: 3, global: 8}")
    for message in asked(root, capsys, *settings).values():
        assert all(words in message for words in ("nothing.idx", "64 samples", "batch.micro=3")), message
        assert all(words in message for words in ("use more text", "change batch.global or batch.micro")), message


def test_a_cache_whose_teacher_does_not_divide(root: Path, capsys: pytest.CaptureFixture[str]):
    """`cache-teacher` with a layout or a k that the teacher does not have: its `--dry-run` refuses what the command refuses"""
    settings = [
        f"teacher={root / 'teacher'}",
        f"output={root / 'cache'}",
        f"data.path={root / 'tokens'}",
        "data.sequence_length=32",
        "k=999",
    ]
    for more in ([], ["--dry-run"]):
        assert "at most the vocabulary of 256" in refused(capsys, "cache-teacher", *settings, *more)
    assert "num_key_value_heads = 3" in refused(capsys, "cache-teacher", *settings, "k=8", "parallel.tensor=4", "--dry-run")
    assert not list(root.glob("cache*"))
