"""The script that writes the measured tables into docs/method.md, and that the document holds what it writes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import METHODS
from studies import table_pico
from tests.helpers.distributed import ROOT


def records(path: Path) -> dict[str, float]:
    """A row for every model of both grids; the perplexity tells which."""
    labels = [f"{a}-{b}" for a, b in itertools.product(table_pico.SCORES, ("uniform", "proportional"))]
    labels += [f"{a}-{b}" for a, b in itertools.product(table_pico.GROUPS, ("none", "hungarian"))]
    values = {label: 100.0 + i for i, label in enumerate(["MoE", *labels, "sf-alpha_0.0", "sf-alpha_0.1"])}
    rows = [{"model": label, "metrics": {"perplexity": value}, "tokens": 4096} for label, value in values.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return values


def test_every_cell_is_the_perplexity_of_its_model(tmp_path: Path):
    values, document = records(tmp_path / "records.jsonl"), tmp_path / "method.md"
    document.write_text(f"before\n{table_pico.BEGIN}\nold\n{table_pico.END}\nafter\n")
    table_pico.main(tmp_path / "records.jsonl", document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{table_pico.END}\nafter\n")
    assert "old" not in text
    assert "4,096 held-out tokens" in text
    assert "| `sf` | **101.0** | 102.0 |" in text
    assert f"| `round_robin` | {values['round_robin-none']:.1f} | {values['round_robin-hungarian']:.1f} |" in text


def test_a_missing_model_or_marker_is_an_error(tmp_path: Path):
    records(tmp_path / "records.jsonl")
    document = tmp_path / "method.md"
    document.write_text("no markers")
    with pytest.raises(ValueError, match="does not have the lines"):
        table_pico.main(tmp_path / "records.jsonl", document)
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(KeyError, match="sf-alpha"):
        table_pico.main(tmp_path / "records.jsonl", document)


def test_the_tables_cover_every_method():
    assert set(METHODS) <= set(table_pico.SCORES)
    assert set(table_pico.GROUPS) == set(groupers)
    assert set(scalers) == {"uniform", "proportional"}


def test_the_document_holds_the_tables():
    text = (ROOT / "docs/method.md").read_text()
    tables = text[text.index(table_pico.BEGIN) : text.index(table_pico.END)]
    for method in (*METHODS, *table_pico.GROUPS):
        assert re.search(rf"\| `{method}` \| \**[\d.]+\** \| \**[\d.]+\** \|", tables), method
