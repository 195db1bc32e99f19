"""The tables of studies/table_pico.sh: python -m studies.table_pico RECORDS DOCUMENT, from the repository's root.

Rewrites what stands between the document's markers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from studies.report import lines, put_between

BEGIN, END = "<!-- studies/table_pico.sh: begin -->", "<!-- studies/table_pico.sh: end -->"
SCORES = ("sf", "pp", "mp", "cp", "reap", "acp", "do_acp", "d_optimal_mp", "random", "random_1", "random_2")
GROUPS = ("weight_cluster", "output_cluster", "router_cluster", "anchor", "round_robin")
NAMES = {"d_optimal_mp": "`d_optimal`, importance `mp`", "random_1": "`random`, seed 1", "random_2": "`random`, seed 2"}


def table(perplexity: Mapping[str, float], rows: Sequence[str], columns: Sequence[str], head: str) -> str:
    """A Markdown table of the perplexities called `<row>-<column>`, the lowest of all in bold."""
    cells = {(row, column): perplexity[f"{row}-{column}"] for row in rows for column in columns}
    said = [f"| {head} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in rows:
        texts = [f"**{cells[row, c]:.1f}**" if cells[row, c] == min(cells.values()) else f"{cells[row, c]:.1f}" for c in columns]
        said.append(f"| {NAMES.get(row, f'`{row}`')} | {' | '.join(texts)} |")
    return "\n".join(said)


def main(records: Path, document: Path) -> None:
    """Write the tables.

    Raises:
        ValueError: the document has no markers. KeyError: a model was not measured.
    """
    rows = lines(records)
    perplexity = {row["model"]: row["metrics"]["perplexity"] for row in rows}
    text = "\n\n".join(
        [
            f"The MoE itself has perplexity {perplexity['MoE']:.1f} on the same {rows[0]['tokens']:,} held-out tokens.",
            f"With the experts of `sf` and every alpha 0, so no FFN at all, it is {perplexity['sf-alpha_0.0']:.1f}; with every alpha 0.1 "
            f"in place of 1/4, {perplexity['sf-alpha_0.1']:.1f}.",
            table(perplexity, SCORES, ("uniform", "proportional"), "scoring, K = G = 4 of 32"),
            table(perplexity, GROUPS, ("none", "hungarian"), "grouping, `sf`, K = 16 into G = 4, `align`:"),
        ]
    )
    put_between(document, (BEGIN, END), text)
    print(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
