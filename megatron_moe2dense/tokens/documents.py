"""Text documents from txt, jsonl, json and parquet files or folders of them, one after the other, in a fixed order."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.tokens.folders import SUFFIXES, kind_of, within

_LONE = re.compile("[\ud800-\udfff]")  # halves of a pair, which json knows and UTF-8 does not
_REPLACEMENT = "\ufffd"
_DECODING = (OSError, EOFError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException)


@dataclass(frozen=True)
class SourceFile:
    """A file with text. source: the entry of the config that it belongs to. text_key: where its rows have their text. named: in the config
    itself, so that nothing of it may be passed over."""

    path: Path
    source: str
    text_key: str
    named: bool

    @property
    def nbytes(self) -> int:
        """On disk."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Document:
    """One text, the share of its file it took, and the source it is of. bytes: for the progress; they add up to the file sizes. mended:
    whether characters that no UTF-8 has were replaced."""

    text: str
    bytes: float
    source: str
    mended: bool = False


def find(source: str | Sequence[str], text_key: str | Mapping[str, str] = "text") -> list[SourceFile]:
    """The files of `source` in order; a folder gives its files with text (with linked folders, without hidden ones, sorted by path).

    Args:
        text_key: of all sources, or by source ("text" where none is given).

    Raises:
        UserError: a path that does not exist, a file of another kind, a folder without any text file, no source at all, one named twice, a
            key for something that is no source.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise UserError("source: an empty list", "at least one file or folder", "name the text files")
    if len(set(sources)) < len(sources):
        twice = next(name for name in sources if sources.count(name) > 1)
        raise UserError(f"source: {twice} stands there twice", "every source once", "remove one of the two")
    keys = {} if isinstance(text_key, str) else dict(text_key)
    if unknown := [name for name in keys if name not in sources]:
        hint = did_you_mean(unknown[0], sources) or "write it as in source"
        raise UserError(f"text_key of {unknown[0]!r}", f"one of the sources: {', '.join(sources)}", hint)
    return [
        SourceFile(path, item, text_key if isinstance(text_key, str) else keys.get(item, "text"), path == Path(item))
        for item in sources
        for path in _files(Path(item))
    ]


def _files(path: Path) -> list[Path]:
    kinds = ", ".join(SUFFIXES)
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(f"{path}: a {path.suffix or 'suffix-less'} file", f"one of {kinds}", "convert it, or rename it to what it is")
        return [path]
    if not path.is_dir():
        raise UserError(f"no file or folder {path}", "an existing source", "check the path")
    files = within(path)
    if not files:
        raise UserError(f"{path}: no file with text in it", f"at least one of {kinds}", "check the folder")
    return files


def read(files: Sequence[SourceFile]) -> Iterator[Document]:
    """All documents of `files`: a txt file is one; a row of jsonl, json or parquet is one. Lone surrogates become U+FFFD.

    Raises:
        UserError: an unreadable file, a broken jsonl line (with its number), a row without text under the text key.
    """
    for file in files:
        kind = kind_of(file.path)
        assert kind is not None, "found by it"
        try:
            for text, share in _READERS[kind](file):
                whole = _LONE.sub(_REPLACEMENT, text)
                yield Document(whole, share, file.source, whole != text)
        except _DECODING as error:
            raise UserError(f"{file.path}: {error}", f"a readable {kind} file in UTF-8", "mend the file or leave it out") from None


_Texts = Iterator[tuple[str, float]]


def _read_txt(file: SourceFile) -> _Texts:
    yield file.path.read_text(encoding="utf-8"), file.nbytes


def _read_jsonl(file: SourceFile) -> _Texts:
    with file.path.open("rb") as raw, _decompressed(file.path, raw) as lines:
        yield from _rows_of_lines(file, lines, raw)


@contextmanager
def _decompressed(path: Path, raw: io.BufferedReader) -> Iterator[Any]:
    if path.suffix == ".gz":
        with GzipFile(fileobj=raw) as lines:
            yield lines
    elif path.suffix == ".zst":
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]
    else:
        yield raw


def _rows_of_lines(file: SourceFile, lines: Any, raw: io.BufferedReader) -> _Texts:
    before = 0
    for number, line in enumerate(lines, 1):
        share = len(line)
        if lines is not raw:  # of what is compressed, how much of it was read meanwhile
            share, before = raw.tell() - before, raw.tell()
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: {error}", "one JSON object a line", "mend or remove the line") from None
        yield _text_of(row, file.text_key, where, "one JSON object a line"), share


def _text_of(row: Any, text_key: str, where: str, expected: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}", expected, "mend or remove it")
    if text_key not in row:
        _no_text(where, text_key, list(row))
    if not isinstance(row[text_key], str):
        raise UserError(f"{where}: {text_key} is a {type(row[text_key]).__name__}", "a string", "mend or remove it")
    return row[text_key]


def _read_json(file: SourceFile) -> _Texts:
    """A list of rows, one row, or jsonl under another name."""
    expected = "a list of JSON objects, one object, or one object a line"
    try:
        content = json.loads(file.path.read_bytes())
    except json.JSONDecodeError as error:
        if "Extra data" not in str(error):
            raise UserError(f"{file.path}: {error}", expected, "mend the file or leave it out") from None
        yield from _read_jsonl(file)
        return
    rows = content if isinstance(content, list) else [content]
    if not file.named and not any(isinstance(row, dict) and file.text_key in row for row in rows):
        logger.info("%s: no %r in it, it is taken for no text and left out", file.path, file.text_key)
        return
    for number, row in enumerate(rows, 1):
        yield _text_of(row, file.text_key, f"{file.path}, row {number}", expected), file.nbytes / len(rows)


def _read_parquet(file: SourceFile) -> _Texts:
    path, text_key = file.path, file.text_key
    with pyarrow.parquet.ParquetFile(path) as opened:
        if text_key not in opened.schema_arrow.names:
            _no_text(str(path), text_key, opened.schema_arrow.names)
        kind = opened.schema_arrow.field(text_key).type
        if not _holds_strings(kind):
            raise UserError(f"{path}: column {text_key} holds {kind}", "a column of strings", "set text_key to the column with the text")
        share, number = file.nbytes / max(opened.metadata.num_rows, 1), 0
        for batch in opened.iter_batches(batch_size=1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text is None:
                    raise UserError(f"{path}, row {number}: {text_key} is null", "a string", "remove the row")
                yield text, share


def _holds_strings(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    is_view = getattr(pyarrow.types, "is_string_view", lambda _: False)  # since pyarrow 16
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or is_view(kind)


def _no_text(where: str, text_key: str, known: Sequence[str]) -> NoReturn:
    hint = did_you_mean(text_key, known)
    raise UserError(
        f"{where}: no {text_key!r} among {', '.join(known)}", f"the text under {text_key!r}", hint or "set text_key to its name"
    )


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".jsonl.zst": _read_jsonl, ".json": _read_json}
_READERS[".parquet"] = _read_parquet
