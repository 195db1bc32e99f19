"""Text documents from txt, jsonl and parquet files or folders of them, one after the other, in a fixed order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pyarrow
import pyarrow.parquet

from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.common.log import logger

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text and the share of its file it took. bytes: for the progress bar; they add up to the file sizes."""

    text: str
    bytes: float


def find(source: str | Sequence[str]) -> list[Path]:
    """The files of `source` in order; a folder gives its txt, jsonl and parquet files (recursive, sorted by path).

    Raises:
        UserError: a path that does not exist, a file of another kind, a folder without any text file, no source at all.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise UserError("source: an empty list", "at least one file or folder", "name the text files")
    return [file for item in sources for file in _files(Path(item))]


def _files(path: Path) -> list[Path]:
    kinds = ", ".join(SUFFIXES)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: a {path.suffix or 'suffix-less'} file", f"one of {kinds}", "convert it, or rename it to what it is")
        return [path]
    if not path.is_dir():
        raise UserError(f"no file or folder {path}", "an existing source", "check the path")
    everything = sorted(item for item in path.rglob("*") if item.is_file())
    files = [item for item in everything if item.suffix in SUFFIXES]
    if not files:
        raise UserError(f"{path}: no file with text in it", f"at least one of {kinds}", "check the folder")
    if len(files) < len(everything):
        logger.info("%s: %d files are no %s and are left out", path, len(everything) - len(files), kinds)
    return files


def read(files: Sequence[Path], text_key: str) -> Iterator[Document]:
    """All documents of `files`: a txt file is one, a jsonl or parquet row is one.

    Raises:
        UserError: an unreadable file, a broken jsonl line (with its number), a row without text under `text_key`.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in files:
        try:
            yield from readers[path.suffix](path, text_key)
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: {error}", f"a readable {path.suffix} file in UTF-8", "mend the file or leave it out") from None


def _read_txt(path: Path, _text_key: str) -> Iterator[Document]:
    yield Document(path.read_text(encoding="utf-8"), path.stat().st_size)


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: {error}", "one JSON object a line", "mend or remove the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a {type(row).__name__}", "one JSON object a line", "mend or remove the line")
            if text_key not in row:
                _no_text(where, text_key, list(row))
            if not isinstance(row[text_key], str):
                raise UserError(f"{where}: {text_key} is a {type(row[text_key]).__name__}", "a string", "mend or remove the line")
            yield Document(row[text_key], len(line))


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if text_key not in file.schema_arrow.names:
            _no_text(str(path), text_key, file.schema_arrow.names)
        kind = file.schema_arrow.field(text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(f"{path}: column {text_key} holds {kind}", "a column of strings", "set text_key to the column with the text")
        share, number = path.stat().st_size / max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text is None:
                    raise UserError(f"{path}, row {number}: {text_key} is null", "a string", "remove the row")
                yield Document(text, share)


def _no_text(where: str, text_key: str, known: Sequence[str]) -> NoReturn:
    hint = did_you_mean(text_key, known)
    raise UserError(
        f"{where}: no {text_key!r} among {', '.join(known)}", f"the text under {text_key!r}", hint or "set text_key to its name"
    )
