"""The tables of docs/serving.md: python -m tests.serving.document [ROWS]

ROWS, of `tests.serving.every_engine`, becomes docs/serving_records.json first."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe2dense.families.engines import FACTS

ROOT = Path(__file__).resolve().parents[2]
PAGE, RECORDS = ROOT / "docs/serving.md", ROOT / "docs/serving_records.json"
# Engine and type of the weights; None: the class.
COLUMNS = (None, ("vllm", "float32"), ("llama_cpp", "float32"), ("llama_cpp", "Q8_0"))
NAMES = {"vllm": "vLLM", "llama_cpp": "llama.cpp"}
INTRODUCTION = """\
`make serving` makes a tiny MoE of each type, in sizes that engines have kernels for, calibrates and converts it with defaults, and asks
engines on a CPU: {versions}. No GPU kernel, no tensor parallelism and no long context is among it.

The figures are the largest difference of a next-token log-probability from stock transformers in float32 [nats], after five prompts and
over the whole vocabulary; 24 greedy tokens after each prompt, and the tokens of all texts, are the same where nothing else is said. Q8_0:
the largest KL of the next token [nats]. `quickstart` is the student that `make quickstart` trains."""


class _Keys(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return f"`{name}`"


def records() -> dict[str, list[dict[str, Any]]]:
    """Rows by type; none before the first `make serving`."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def served(model_type: str) -> list[str]:
    """Names of the engines that compute what transformers does."""
    rows = records().get(model_type, [])
    return [name for engine, name in NAMES.items() if any(_is(row, engine, "float32") and row["verdict"] == "same" for row in rows)]


def page(text: str) -> str:
    """docs/serving.md with its tables as the records and the code say."""
    for name, content in (("engines", engines()), ("facts", facts())):
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{content}\n<!-- /{name} -->{rest.partition(f'<!-- /{name} -->')[2]}"
    return text


def engines() -> str:
    """What was measured."""
    found, notes = records(), []
    body = [(f"`{model_type}`", *(_cell(rows, column, notes) for column in COLUMNS)) for model_type, rows in found.items()]
    versions = sorted({row["version"] for rows in found.values() for row in rows if row["version"]})
    measured = table(("dense result of", "class", "vLLM", "llama.cpp", "Q8_0"), body)
    listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    return "\n\n".join([INTRODUCTION.format(versions="; ".join(versions)), measured, *([listed] if notes else [])])


def facts() -> str:
    """What engines do otherwise as far as a config tells."""
    rows = [(each.engine, ", ".join(f"`{name}`" for name in each.types) or "all", each.said.format_map(_Keys()), each.do) for each in FACTS]
    return table(("engine", "`model_type`", "what it does", "what helps"), rows)


def _is(row: dict[str, Any], engine: str, weights: str) -> bool:
    return (row["engine"], row["weights"]) == (engine, weights)


def _cell(rows: list[dict[str, Any]], column: tuple[str, str] | None, notes: list[str]) -> str:
    """A figure, or a number of the list of notes with an engine's own words."""
    if column is None:
        return ", ".join(dict.fromkeys(f"`{row['model']}`" for row in rows if row["model"])) or "-"
    row = next((row for row in rows if _is(row, *column)), None)
    if row is None:
        return "not asked"
    figure = {"float32": row["difference"], "Q8_0": row["kl"]}[column[1]]
    said = f"{figure:.1e}" if figure is not None else "no"
    if row["verdict"] == "same" and not row["reason"]:
        return said
    note = f"{NAMES[row['engine']]}: {row['reason'].replace('|', '/')}"
    if note not in notes:
        notes.append(note)
    return f"{said} ({notes.index(note) + 1})"


def table(header: Iterable[str], rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    columns = list(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def main(arguments: list[str]) -> None:
    """Take over new records, write the tables."""
    if arguments:
        shutil.copy(arguments[0], RECORDS)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
