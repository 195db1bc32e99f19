"""The documents on families say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_moe2dense.families.table import EXCEPTIONS
from tests.families.document import page
from tests.families.every import moe_types, wrapper_types
from tests.families.facts import MODELS
from tests.families.test_every_wrapper import CONVERTED
from tests.serving import document as serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CLASS = r"`(\w+For(?:CausalLM|ConditionalGeneration))`"


def test_the_page_is_what_its_script_prints():
    expected = (ROOT / "docs/families.md").read_text().splitlines()
    assert page().splitlines() == expected, "python -m tests.families.document > docs/families.md"


def test_facts_are_of_types_that_there_are():
    assert set(MODELS) <= {*moe_types(), *wrapper_types()}
    assert set(serving.records()) <= {*moe_types(), "quickstart"}


def test_the_tables_of_serving_are_what_records_and_code_say():
    found = serving.PAGE.read_text()
    assert serving.page(found) == found, "python -m tests.serving.document"


def test_the_readme_names_no_other_class_than_the_page():
    section = (ROOT / "README.md").read_text().partition("## Supported families")[2].partition("\n## ")[0]
    refused = [model_type for model_type in moe_types() if model_type in EXCEPTIONS and EXCEPTIONS[model_type].refused]
    assert f"{len(moe_types()) - len(refused)} of the {len(moe_types())} causal MoE types" in section
    assert f"{len(CONVERTED)} of its {len(wrapper_types())} models for images or sound" in section.replace("\n", " ")
    assert set(re.findall(CLASS, section)) <= set(re.findall(CLASS, (ROOT / "docs/families.md").read_text()))


def test_what_is_derived_can_be_seen_as_the_document_says(capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "DenseForm" in block]
    exec(compile(code, "docs/adding.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "MoePlace(layer=0, block='mlp'" in printed
    assert "BlockFacts(active=8, score='softmax', routed_factor=1.0" in printed
    assert "itself, one expert" in printed
    assert "'intermediate_size': 8192" in printed
