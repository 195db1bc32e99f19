"""What a user's shell has: the commands on its path, and text."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.forks import forks

ROOT = Path(__file__).resolve().parents[2]


def on_path(folder: Path) -> dict[str, str]:
    """An environment in which `moe2dense` and `torchrun` are those of this interpreter and this checkout."""
    forks().commands(folder)
    one_machine = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **one_machine, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def texts(folder: Path, documents: int) -> None:
    """Paragraphs of the project's own documents, a file each: English of a few hundred tokens."""
    folder.mkdir()
    paragraphs = [part for file in sorted((ROOT / "docs").glob("*.md")) for part in file.read_text().split("\n\n") if len(part) > 600]
    for number in range(documents):
        (folder / f"{number:03d}.txt").write_text(paragraphs[number % len(paragraphs)])
