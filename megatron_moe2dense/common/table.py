"""Plain aligned text tables for stdout."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

_WIDEST_MIDDLE, _NARROWEST_LAST = 24, 40  # characters of a column of `wrapped`


def render(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns padded to their widest cell; numbers right-aligned, text left-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [all(isinstance(row[i], (int, float)) or row[i] is None for row in rows) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        return "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in cells)])


def wrapped(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table of text no wider than `width`, where its first column leaves room: cells that are too long go on in the lines below."""
    natural = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    first, *middle = natural[:-1]
    middle = [min(size, _WIDEST_MIDDLE) for size in middle]
    last = max(_NARROWEST_LAST, width - first - sum(middle) - 2 * (len(header) - 1))
    widths = [first, *middle, min(natural[-1], last)]

    def lines(row: Sequence[str]) -> list[str]:
        parts = [_folded(cell, size) for cell, size in zip(row, widths, strict=True)]
        high = max(map(len, parts))
        columns = [[cell.ljust(size) for cell in [*part, *[""] * (high - len(part))]] for part, size in zip(parts, widths, strict=True)]
        return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]

    return "\n".join(line for row in [header, ["-" * size for size in widths], *rows] for line in lines(row))


def _folded(text: str, width: int) -> list[str]:
    """Broken at spaces, and at the bars of alternatives."""
    if len(text) <= width:
        return [text]
    apart = text if " " in text else text.replace("|", "| ")
    return [line.replace("| ", "|") if apart is not text else line for line in textwrap.wrap(apart, width)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
