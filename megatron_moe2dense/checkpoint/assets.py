"""The small files that travel with a checkpoint: tokenizer, chat template, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_moe2dense.common.errors import UserError
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
    """Copy the assets that `source` has, byte for byte; returns their names.

    Raises:
        UserError: one is a link to somewhere outside `source`, whose content would be published with the model. Links into the
            `blobs` folder of a Hugging Face cache are none of these.
    """
    copied = [name for name in ASSETS if (source / name).exists()]
    folder = source.resolve()
    for name in copied:
        place = (source / name).resolve()
        if not place.is_relative_to(folder) and place.parent != folder.parent.parent / "blobs":
            raise UserError(f"{source / name} is a link to {place}", f"a file in {source}", "put a copy of the file in its place")
        with disk_errors(target / name):
            shutil.copyfile(source / name, target / name)
    return copied
