"""JSON-lines files: `records.jsonl` (one evaluated model a line) and `metrics.jsonl` (one training step a line)."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import disk_errors, write_text

_CHUNK = 65_536  # bytes


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row; several writers never interleave, a line that a killed writer cut off is removed first. Flushed to disk."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(_complete_size(file))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _complete_size(file: IO[bytes]) -> int:
    """Bytes up to and including the last newline."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _CHUNK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line cut off by a killed writer is dropped, any other broken line is a UserError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error}", "a .jsonl file", "check the path") from None
    complete, rows = lines[:-1], []
    for number, line in enumerate(complete, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error}", "one JSON object a line", "remove the broken line") from None
    return rows


def rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file's rows atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
