"""The tokenizer of a result is that of its source, or a user is told which tokenizer engines take and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_moe2dense.cli import main
from tests.helpers.tiny_models import tiny, write_tokens


def converted(folder: Path, family: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `convert` says of a model with the tokenizer that lies in `folder`."""
    tiny(family, folder / "moe", vocab_size=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, folder / "moe")
    text = f"data={{path: {write_tokens(folder / 'text', 16 * 8)}, sequence_length: 16}}"
    main(["calibrate", f"source={folder}/moe", f"output={folder}/statistics", text])
    main(["convert", f"source={folder}/moe", f"statistics={folder}/statistics", f"output={folder}/dense"])
    return capsys.readouterr().err


@pytest.fixture
def folder(tokenizer_directory: Path, tmp_path: Path) -> Path:
    """A byte-level tokenizer that keeps digits together, as the classes of some model types do not."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_directory / file, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_model_type_has_a_tokenizer_class_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]):
    """a dense class for whose model_type AutoTokenizer takes another class: said, with both classes and how to serve it"""
    said = converted(folder, "qwen2_moe", capsys)
    before, after = (AutoTokenizer.from_pretrained(folder / name) for name in ("moe", "dense"))
    text = "it's 12,345.678"
    assert before(text)["input_ids"] != after(text)["input_ids"], "the case has gone: nothing to say any more"
    assert f"take {type(after).__name__} for the result and {type(before).__name__} for its source" in said
    assert f"--tokenizer {folder}/moe" in said


@pytest.mark.slow
def test_a_tokenizer_that_stays_is_not_spoken_of(folder: Path, capsys: pytest.CaptureFixture[str]):
    """the same tokenizer beside a model type without a class of its own: the same tokens, not a word"""
    assert "AutoTokenizer" not in converted(folder, "qwen3_moe", capsys)
