"""The table of cases in docs/operations.md, from the first lines of the tests' docstrings: `python -m tests.cases.document` writes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- cases: python -m tests.cases.document -->", "<!-- end of cases -->"


def cases() -> Iterator[tuple[str, str, str]]:
    """Topic, situation, what happens."""
    for file in sorted(HERE.glob("test_*.py")):
        topic = file.stem.removeprefix("test_").replace("_", " ")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and (said := ast.get_docstring(node)):
                situation, _, happens = said.splitlines()[0].partition(": ")
                yield topic, situation, happens


def table() -> str:
    """Markdown, one row a case, by topic."""
    rows = ["| about | situation | what happens |", "|---|---|---|"]
    last = ""
    for topic, situation, happens in cases():
        rows.append(f"| {'' if topic == last else topic} | {situation} | {happens.rstrip('.')} |")
        last = topic
    return "\n".join(rows)


def written(text: str) -> str:
    """The document with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
