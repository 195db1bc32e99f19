"""llama.cpp's names of what splits text: its own server cuts text as the tokenizer does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_moe2dense.families import pre_tokenizers as table
from megatron_moe2dense.families.tokenized import TEXTS
from megatron_moe2dense.serving import gguf
from megatron_moe2dense.serving.config import GgufConfig
from megatron_moe2dense.serving.engines import Place

HERE = Path(__file__)


def trained(name: str, folder: Path) -> Path:
    """A BPE tokenizer of 2,048 tokens with the pattern that llama.cpp calls `name`."""
    pattern, whole_words = next(known for known, called in table._PATTERNS.items() if called == name)
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, last]) if split else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS * 20, *(path.read_text() for path in HERE.parent.glob("*.py"))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(table._PATTERNS.values())))
def test_llama_cpp_cuts_text_as_the_tokenizer_does(name: str, dense: Path, tmp_path: Path) -> None:
    source = trained(name, Path(shutil.copytree(dense, tmp_path / "source")))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))
    assert table.named(source) == name
    facts = gguf.write(source, tmp_path / "model.gguf", "Q8_0", GgufConfig())
    assert facts["pre_tokenizer"] == name
    request = {"model": str(tmp_path / "model.gguf"), "texts": TEXTS, "prompts": [], "vocabulary": 2048, "new_tokens": 1, "context": 64}
    answer = Place("llama_cpp", sys.executable).ask({**request, "threads": 1, "speed": None}, tmp_path)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert answer["tokens"] == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": None},
        {"model": {"type": "Unigram"}},
    ],
)
def test_what_is_done_otherwise_has_no_name(change: dict, tmp_path: Path) -> None:
    content = json.loads((trained("gpt-2", tmp_path) / "tokenizer.json").read_text())
    assert table.named(tmp_path) == "gpt-2"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    assert table.named(tmp_path) is None


def test_without_tokenizer_json_there_is_no_name(tmp_path: Path) -> None:
    assert table.named(tmp_path) is None
