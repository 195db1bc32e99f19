"""What splits a tokenizer's text before its byte pairs are merged, by llama.cpp's name for it.

llama.cpp implements these itself and knows a tokenizer by a hash of the ids of one text, so it refuses any that was trained anew,
whatever its pattern. The pattern stands in tokenizer.json and is looked up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Of tokenizer.json: the pattern of its `Split`, without which its `ByteLevel` uses GPT-2's; and whether whole words are looked up before
# merging. Those in which llama.cpp b11549 cuts any text as the tokenizer does; its gpt-4o takes combining marks for no letters.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS: dict[tuple[str | None, bool], str] = {
    (None, False): "gpt-2",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}", False): "qwen2",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}", True): "llama-bpe",
}


def named(directory: Path) -> str | None:
    """llama.cpp's name of what the tokenizer of a Hugging Face directory does; None for any other, and where no tokenizer.json says it."""
    try:
        content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    model = content.get("model") or {}
    if model.get("type") != "BPE" or content.get("normalizer"):
        return None
    return _PATTERNS.get((_pattern(content.get("pre_tokenizer") or {}), bool(model.get("ignore_merges"))))


def _pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern of `Split` then `ByteLevel`, None for `ByteLevel` alone; what is anything else is no pattern of the table."""
    parts = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    *before, last = parts or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return "no byte level"
    if not before:
        return None if last.get("use_regex", True) else "no pattern"
    split = before[0]
    if split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert") or last.get("use_regex", True):
        return "another split"
    return split.get("pattern", {}).get("Regex", "a string")
