"""The files with text in a folder: through links to other folders, past hidden ones, and with a word about all that is not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_moe2dense.common.log import logger

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")


def kind_of(path: Path) -> str | None:
    """Which of SUFFIXES a file is by its name; None for another kind."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def within(folder: Path) -> list[Path]:
    """All files with text below a folder, sorted by path. Each real folder is read once; hidden files and folders never."""
    everything = list(_walk(folder, {}))
    hidden = [path for path in everything if path.name.startswith(".")]
    files = [path for path in everything if not path.name.startswith(".") and path.is_file()]
    text = sorted(path for path in files if kind_of(path) is not None)
    for path in everything:
        if path.is_symlink() and not path.exists():
            logger.warning("%s: a link to nothing, left out", path)
    if hidden:
        logger.info("%s: %d hidden files and folders such as %s are left out", folder, len(hidden), hidden[0].relative_to(folder))
    if len(text) < len(files):
        logger.info("%s: %d files are no %s and are left out", folder, len(files) - len(text), ", ".join(SUFFIXES))
    return text


def _walk(folder: Path, seen: dict[Path, Path]) -> Iterator[Path]:
    """Files, and hidden folders in place of what is in them. seen: the folders read so far, by their real place."""
    real = folder.resolve()
    if real in seen:
        kind = "a loop of links" if folder.is_relative_to(seen[real]) else "the same folder"
        logger.warning("%s: %s, already read as %s; left out here", folder, kind, seen[real])
        return
    seen[real] = folder
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from _walk(path, seen)
        else:
            yield path
