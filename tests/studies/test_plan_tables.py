"""The tables of docs/operations.md are those of studies/plan_tables.py, and published throughputs are met: a check of two points."""

from __future__ import annotations

import pytest

from megatron_moe2dense.operations.plan.config import HardwareConfig
from studies.plan_tables import HEADER, SCALE_HEADER, distillation, published, published_rows, scale_rows
from studies.report import markdown
from tests.helpers.distributed import ROOT

DOCUMENT = ROOT / "docs/operations.md"


def test_published_throughputs_are_met_within_30_percent_by_one_efficiency():
    for run in published():
        assert run.hardware.efficiency == HardwareConfig().efficiency
        assert run.planned() == pytest.approx(run.tokens_per_second, rel=0.3), run.name


def test_the_document_has_the_numbers_of_the_formulas():
    text = DOCUMENT.read_text()
    assert markdown(HEADER, published_rows()) in text
    assert markdown(SCALE_HEADER, scale_rows([(8, *distillation(8))])) in text.replace("\n| 16 |", "\n\n| 16 |")
