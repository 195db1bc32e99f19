"""What the scripts share that write measured tables into documents."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; the mean alone for one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    table = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in table)


def parts_around(document: Path, markers: tuple[str, str]) -> tuple[str, str]:
    """The text up to and with the first marker, and from the second on.

    Raises:
        ValueError: the document has not both lines, in order.
    """
    before, begin, rest = document.read_text().partition(markers[0] + "\n")
    _, end, after = rest.partition(markers[1] + "\n")
    if not begin or not end:
        raise ValueError(f"{document} does not have the lines {markers[0]} and {markers[1]}")
    return before + begin, end + after


def put_between(document: Path, markers: tuple[str, str], text: str) -> None:
    """Rewrite what stands between the markers; errors as of `parts_around`."""
    before, after = parts_around(document, markers)
    document.write_text(f"{before}{text}\n{after}")
