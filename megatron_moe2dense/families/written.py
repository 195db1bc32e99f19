"""The end of whatever writes a checkpoint: a config.json for every reader, small files of its source, the proof that the stock class takes
it, and that its tokenizer is still the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_moe2dense.checkpoint.assets import copy_assets
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.readers import contradictions, differences, for_all_readers

# Where tokenizers part: words, digits, scripts without spaces, combining marks, code, white space, emoji.
TEXTS = (
    "The quick brown fox can't jump; it's 12,345.678 metres (or 7^89%).",
    "def f(x):\n\treturn  x ** 2 + 0x1F  # two  spaces\n\n\n",
    "Größe, naïve, \ufb01n, e\u0301tude - Привет, мир! Γειά. שלום 123. مرحبا. नमस्ते. สวัสดี",
    "深度学习模型\uff0c2026年。こんにちは世界。안녕하세요 👩\u200d💻🙂",
    "  leading, trailing  \r\n and\u00a0no-break\u2003spaces ",
)
_CONVERSATION = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[3]}, {"role": "user", "content": "Why?"}]


def finish(directory: Path, config: Mapping[str, Any], source: Path, processors: bool = False) -> None:
    """Write config.json and the small files beside the weights, and look at the whole as stock transformers does.

    Args:
        source: where tokenizer and other small files are from. processors: those of images and sound too.

    Raises:
        UserError: the stock class does not take every tensor; the directory is gone then.
    """
    write_json(directory / "config.json", for_all_readers(config))
    copy_assets(source, directory, processors)
    try:
        account = Account.open(directory)
    except UserError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise UserError(
            f"what was written does not open: {error.found}", error.expected, "nothing was left there; please report config.json and this"
        ) from None
    called = directory.with_name(directory.name.removesuffix(".tmp"))  # once it is complete
    different = tokenized_otherwise(source, directory, called)
    for said in [*believed_otherwise(account), *([different] if different else [])]:
        logger.warning("%s: %s", called, said)


def believed_otherwise(account: Account) -> list[str]:
    """What to know of a config.json that stock transformers runs and other readers may not: what its class believes that no model can have,
    or that the file or the tensors say otherwise."""
    said, believed = account.index.config, json.loads(json.dumps(account.stock.model.config.to_dict()))
    meant = {name: _filled(value, believed[name]) for name, value in said.items() if name in believed}
    wrong = contradictions(believed) + differences(meant, believed)
    dtype = said.get("dtype") or said.get("torch_dtype")
    types = {str(each).removeprefix("torch.") for each in map(account.values.dtype, account.values.shapes) if each.is_floating_point}
    if dtype and types and dtype not in types:
        wrong.append(f"{dtype}, and the files hold {' and '.join(sorted(types))}")
    do = "correct it there, or convert the MoE again: keys that a config.json leaves out come back as the class's defaults"
    return [f"config.json says {each}; {do}" for each in wrong]


def _filled(said: Any, believed: Any) -> Any:
    """A block with what the class adds to it, as the type of rotary positions."""
    return {**believed, **said} if isinstance(said, dict) and isinstance(believed, dict) else said


def tokenized_otherwise(source: Path, result: Path, called: Path) -> str | None:
    """What to know where stock transformers takes another tokenizer for the result than for its source: the class may go by model_type.
    None where both give the same ids of text in several scripts, code, special tokens and the chat template, or the source has none.

    Args:
        called: the result's name there.
    """
    try:
        before = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception:  # of a tokenizer that transformers alone can not open, which `copy_assets` has said
        return None
    try:
        after = AutoTokenizer.from_pretrained(result, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        return f"AutoTokenizer opens the source's tokenizer, not the result's: {error}"
    texts = [*TEXTS, "".join(before.all_special_tokens)]
    if all(before(text)["input_ids"] == after(text)["input_ids"] for text in texts) and _chat(before) == _chat(after):
        return None
    cls = type(before).__name__
    return (
        f"AutoTokenizer, and engines that ask it (transformers, vLLM, lm-eval), take {type(after).__name__} for the result and "
        f"{cls} for its source, which gives other tokens. Serve it with the source's tokenizer: vllm serve --tokenizer {source}; in "
        f"transformers {cls}.from_pretrained({str(called)!r})"
    )


def _chat(tokenizer: Any) -> Any:
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.apply_chat_template(_CONVERSATION, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template may want other roles
        return str(error)
