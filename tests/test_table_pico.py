"""The script that writes the measured tables into docs/method.md, and that the document holds what it writes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import METHODS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table_pico", ROOT / "launch/table_pico.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(script: ModuleType, path: Path) -> dict[str, float]:
    """A row for every model of both grids; the perplexity tells which."""
    labels = [f"{a}-{b}" for a, b in itertools.product(script.SCORES, ("uniform", "proportional"))]
    labels += [f"{a}-{b}" for a, b in itertools.product(script.GROUPS, ("none", "hungarian"))]
    values = {label: 100.0 + i for i, label in enumerate(["MoE", *labels, "sf-alpha_0.0", "sf-alpha_0.1"])}
    rows = [{"model": label, "metrics": {"perplexity": value}, "tokens": 4096} for label, value in values.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return values


def test_every_cell_is_the_perplexity_of_its_model(script: ModuleType, tmp_path: Path):
    values, document = records(script, tmp_path / "records.jsonl"), tmp_path / "method.md"
    document.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    script.main(tmp_path / "records.jsonl", document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{script.END}\nafter\n")
    assert "old" not in text
    assert "4,096 held-out tokens" in text
    assert "| `sf` | **101.0** | 102.0 |" in text
    assert f"| `round_robin` | {values['round_robin-none']:.1f} | {values['round_robin-hungarian']:.1f} |" in text


def test_a_missing_model_or_marker_is_an_error(script: ModuleType, tmp_path: Path):
    records(script, tmp_path / "records.jsonl")
    document = tmp_path / "method.md"
    document.write_text("no markers")
    with pytest.raises(ValueError, match="does not have the lines"):
        script.main(tmp_path / "records.jsonl", document)
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(KeyError, match="sf-alpha"):
        script.main(tmp_path / "records.jsonl", document)


def test_the_tables_cover_every_method(script: ModuleType):
    assert set(METHODS) <= set(script.SCORES)
    assert set(script.GROUPS) == set(groupers)
    assert set(scalers) == {"uniform", "proportional"}


def test_the_document_holds_the_tables(script: ModuleType):
    text = (ROOT / "docs/method.md").read_text()
    tables = text[text.index(script.BEGIN) : text.index(script.END)]
    for method in (*METHODS, *script.GROUPS):
        assert re.search(rf"\| `{method}` \| \**[\d.]+\** \| \**[\d.]+\** \|", tables), method
