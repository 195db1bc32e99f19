"""JSON-lines files: `records.jsonl` (one evaluated model a line) and `metrics.jsonl` (one training step a line)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import disk_errors, write_text


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row with a single write, so that several writers never interleave; flushed to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), path.open("ab", buffering=0) as file:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        os.fsync(file.fileno())


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
