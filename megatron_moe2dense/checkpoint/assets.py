"""The small files that travel with a checkpoint: tokenizer, chat template, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_moe2dense.common.outputs import disk_errors

ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_assets(source: Path, target: Path) -> list[str]:
    """Copy the assets that `source` has, byte for byte; returns their names."""
    copied = [name for name in ASSETS if (source / name).exists()]
    for name in copied:
        with disk_errors(target / name):
            shutil.copyfile(source / name, target / name)
    return copied
