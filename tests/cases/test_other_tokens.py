"""The tokenizer of a result is that of its source, or a user is told which tokenizer engines take and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from megatron_moe2dense.cli import main
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals import harness
from megatron_moe2dense.evals.config import HarnessConfig
from megatron_moe2dense.families import tokenized
from megatron_moe2dense.families.tokenized import own_tokenizer
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


class _Asked(Exception):  # noqa: N818 - no error
    """What stands where lm-eval's model would."""


def scored_with(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tokenizer that eval hands to lm-eval."""

    def model(**options: Any) -> None:
        raise _Asked(options["tokenizer"])

    monkeypatch.setattr(harness, "_shared", lambda *_: model)
    with pytest.raises(_Asked) as asked:
        harness.in_process(SimpleNamespace(device="cpu"), directory, HarnessConfig(tasks=["piqa"]), Ranks())  # type: ignore[arg-type]
    return asked.value.args[0]


@pytest.mark.slow
def test_a_model_type_has_a_tokenizer_class_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """a dense class for whose model_type AutoTokenizer takes another class: said, with how to serve it; eval takes the source's"""
    said = converted(folder, "qwen2_moe", capsys)
    before, after = (AutoTokenizer.from_pretrained(folder / name) for name in ("moe", "dense"))
    text = "it's 12,345.678"
    assert before(text)["input_ids"] != after(text)["input_ids"], "the case has gone: nothing to say any more"
    assert f"take {type(after).__name__} for the result and {type(before).__name__} for its source" in said
    assert f"--tokenizer {folder}/moe" in said
    main(["export", f"checkpoint={folder}/dense", f"output={folder}/export"])
    said = capsys.readouterr().err
    assert f"take {type(after).__name__} for the result and {type(before).__name__} for its source" in said
    assert "--tokenizer FOLDER" in said  # the dense folder's AutoTokenizer is no help
    alone = folder / "tokenizer"
    alone.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "export" / file, alone)
    assert AutoTokenizer.from_pretrained(alone)(text)["input_ids"] == before(text)["input_ids"]
    assert scored_with(folder / "export", monkeypatch)(text)["input_ids"] == before(text)["input_ids"]


@pytest.mark.slow
def test_a_tokenizer_that_stays_is_not_spoken_of(folder: Path, capsys: pytest.CaptureFixture[str]):
    """the same tokenizer beside a model type without a class of its own: the same tokens, not a word"""
    assert "AutoTokenizer" not in converted(folder, "qwen3_moe", capsys)


def test_a_class_that_tokenizer_config_names_wrongly(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """a tokenizer_config.json that names a class which departs from tokenizer.json, as some published ones do: AutoTokenizer's stays"""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"}))
    monkeypatch.setattr(tokenized, "_auto", lambda directory: PreTrainedTokenizerFast.from_pretrained(directory))
    assert type(own_tokenizer(folder)) is PreTrainedTokenizerFast
    monkeypatch.setattr(tokenized, "_auto", lambda directory: LlamaTokenizer.from_pretrained(directory))
    assert type(own_tokenizer(folder)) is LlamaTokenizer  # neither is as the file describes it
