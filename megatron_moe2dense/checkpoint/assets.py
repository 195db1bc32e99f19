"""The small files that travel with a checkpoint: tokenizer, chat template, generation config; of models for images or sound, what
prepares those."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import disk_errors

ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Each of them is enough for stock transformers.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
_UNREADABLE = "no tokenizer that stock transformers can open"
# Of images and sound: not beside a language model alone.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json")


def tokenizer_of(source: Path) -> str:
    """What of a tokenizer a folder has, in words; begins with `no` where stock transformers can not open it."""
    plain = [name for name in _TOKENIZERS if (source / name).exists()]
    if plain:
        return plain[0]
    code = sorted(path.name for path in source.glob("tokenization_*.py"))
    if not code and not (source / "tiktoken.model").exists():
        return "no tokenizer files"
    parts = [*(["tiktoken.model"] if (source / "tiktoken.model").exists() else []), *(code or ["code that is not here"])]
    return f"{_UNREADABLE}: {' and '.join(parts)}, and neither tokenizer.json nor tokenizer.model"


def require_tokenizer(source: Path) -> None:
    """UserError where a folder has no tokenizer that stock transformers opens, which makes an empty one up without a word."""
    held = tokenizer_of(source)
    if held.startswith("no "):
        raise UserError(f"{source}: {held}", "a tokenizer beside the weights", "copy that of its teacher")


def copy_assets(source: Path, target: Path, processors: bool = False) -> list[str]:
    """Copy the assets that `source` has, byte for byte; returns their names. A tokenizer that needs code, which is not copied, is said.

    Args:
        processors: those of images and sound too.

    Raises:
        UserError: one is a link to somewhere outside `source`, whose content would be published with the model. Links into the
            `blobs` folder of a Hugging Face cache are none of these.
    """
    copied = [name for name in (*ASSETS, *(PROCESSORS if processors else ())) if (source / name).exists()]
    folder = source.resolve()
    for name in copied:
        place = (source / name).resolve()
        if not place.is_relative_to(folder) and place.parent != folder.parent.parent / "blobs":
            raise UserError(f"{source / name} is a link to {place}", f"a file in {source}", "put a copy of the file in its place")
        with disk_errors(target / name):
            shutil.copyfile(source / name, target / name)
    said = tokenizer_of(source)
    if said.startswith(_UNREADABLE):
        do = "make a tokenizer.json where its code may run: AutoTokenizer.from_pretrained(..., trust_remote_code=True).save_pretrained(...)"
        logger.warning("%s: %s; code is not copied, so the result has no tokenizer: %s", source, said, do)
    return copied
