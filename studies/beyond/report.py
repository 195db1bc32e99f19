"""The tables and figures of studies/beyond_pico.sh: python -m studies.beyond.report OUT DOCUMENT, from the repository's root.

Rewrites what stands between the document's markers, a part of the script each, where the part has results; beside the document go
beyond_records.jsonl and images/beyond_PART.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_moe2dense.common import records
from megatron_moe2dense.plots.style import style
from studies.beyond import automatic, choices, initial, lasting, shared, tuning
from studies.beyond.section import Row
from studies.report import parts_around, put_between

PARTS = {
    "initial": initial.section,
    "tuning": tuning.tuning,
    "factors": tuning.factors,
    "lasting": lasting.section,
    "choices": choices.section,
    "automatic": automatic.section,
    "shared": shared.section,
}


def markers(part: str) -> tuple[str, str]:
    """The lines around a part's tables."""
    return f"<!-- studies/beyond_pico.sh: {part} -->", f"<!-- end of {part} -->"


def main(out: Path, document: Path) -> None:
    """Write records, figures and tables; a part without results keeps what it had.

    Raises:
        ValueError: the document has no markers. OSError, KeyError, StopIteration: a part's results are not complete.
    """
    for part in PARTS:
        parts_around(document, markers(part))  # before any work
    written = document.with_name("beyond_records.jsonl")
    rows: list[Row] = records.read(written) if written.exists() else []
    folder = document.parent / "images"
    folder.mkdir(exist_ok=True)
    for part, make in PARTS.items():
        with style():
            section = make(out)
            if section is not None and section.figure is not None:
                section.figure.savefig(folder / f"beyond_{part}.png", dpi=150)
        if section is not None:
            put_between(document, markers(part), section.text)
            rows = [row for row in rows if row["part"] != part] + [{"part": part, **row} for row in section.rows]
            print(f"{part}\n\n{section.text}\n")
    records.rewrite(written, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
