"""What a user's shell has: the commands on its path, and text."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer

from megatron_moe2dense.tokens.indexed import TokenFile
from tests.helpers.forks import forks

ROOT = Path(__file__).resolve().parents[2]


def on_path(folder: Path) -> dict[str, str]:
    """An environment in which `moe2dense` and `torchrun` are those of this interpreter and this checkout."""
    forks().commands(folder)
    one_machine = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **one_machine, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def texts(folder: Path, documents: int) -> None:
    """Text of the kind that the pico model was trained on, a file each: a few hundred tokens."""
    example = ROOT / "examples/pico_moe"
    tokens, tokenizer = TokenFile.open(str(example / "tokens/distill")).tokens, Tokenizer.from_file(str(example / "model/tokenizer.json"))
    folder.mkdir()
    for number in range(documents):
        part = tokens[number * 600 : (number + 1) * 600].tolist()
        (folder / f"{number:03d}.txt").write_text(tokenizer.decode(part))
