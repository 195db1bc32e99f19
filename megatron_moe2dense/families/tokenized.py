"""The tokenizer of a folder: that which its files describe, and whether stock transformers takes it, whose class may go by model_type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer

# Where tokenizers part: words, digits, scripts without spaces, combining marks, code, white space, emoji.
TEXTS = (
    "The quick brown fox can't jump; it's 12,345.678 metres (or 7^89%).",
    "def f(x):\n\treturn  x ** 2 + 0x1F  # two  spaces\n\n\n",
    "Größe, naïve, \ufb01n, e\u0301tude - Привет, мир! Γειά. שלום 123. مرحبا. नमस्ते. สวัสดี",
    "深度学习模型\uff0c2026年。こんにちは世界。안녕하세요 👩\u200d💻🙂",
    "  leading, trailing  \r\n and\u00a0no-break\u2003spaces ",
)
_CONVERSATION = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[3]}, {"role": "user", "content": "Why?"}]


def own_tokenizer(directory: Path) -> Any:
    """The folder's tokenizer as stock transformers opens it; by the class that its tokenizer_config.json names where AutoTokenizer takes
    another, for the model_type, that departs from tokenizer.json while the named one does not.

    Raises:
        OSError, ValueError: none that transformers can open.
    """
    found = _auto(directory)
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not (file.exists() and settings.exists()):
        return found
    named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
    cls = getattr(transformers, named, None) if isinstance(named, str) else None
    if cls is None or cls is type(found):
        return found
    plain = tokenizers.Tokenizer.from_file(str(file))
    described = [plain.encode(text, add_special_tokens=False).ids for text in TEXTS]
    if _ids(found) == described:
        return found
    own = cls.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return own if _ids(own) == described else found


def _auto(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def tokenized_otherwise(source: Path, result: Path, called: Path) -> str | None:
    """What to know where stock transformers takes another tokenizer for the result than its source has: the class may go by model_type.
    None where both give the same ids of text in several scripts, code, special tokens and the chat template, or the source has none.

    Args:
        called: the result's name there.
    """
    try:
        before = own_tokenizer(source)
    except Exception:  # of a tokenizer that transformers alone can not open, which `copy_assets` has said
        return None
    try:
        after = _auto(result)
    except Exception as error:
        return f"AutoTokenizer opens the source's tokenizer, not the result's: {error}"
    if _alike(before, after):
        return None
    cls = type(before).__name__
    if _alike(before, _auto(source)):
        do = f"vllm serve --tokenizer {source}"
    else:  # a source of the same type, as the student of an export is
        do = "put tokenizer.json and tokenizer_config.json into a folder of their own, vllm serve --tokenizer FOLDER"
    return (
        f"AutoTokenizer, and engines that ask it (transformers, vLLM, lm-eval by itself), take {type(after).__name__} for the result and "
        f"{cls} for its source, which gives other tokens. Serve it with the source's tokenizer: {do}; in transformers "
        f"{cls}.from_pretrained({str(called)!r}), which moe2dense eval takes by itself"
    )


def _alike(before: Any, after: Any) -> bool:
    texts = [*TEXTS, "".join(before.all_special_tokens)]
    return all(before(text)["input_ids"] == after(text)["input_ids"] for text in texts) and _chat(before) == _chat(after)


def _chat(tokenizer: Any) -> Any:
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.apply_chat_template(_CONVERSATION, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template may want other roles
        return str(error)
