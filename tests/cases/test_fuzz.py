"""Checkpoints with one tensor that is not as it should be: a part of tests.cases.fuzz, whose whole takes hours (`make fuzz`)."""

from __future__ import annotations

import pytest

from tests.cases.fuzz import SUBJECTS, WRONG, by_commands, by_headers, outcomes_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_tensor_is_not_as_it_should_be(name: str):
    """a tensor absent, of another shape or type, NaN, or there twice: what stock transformers gives, or exit 2 and the tensor's name"""
    assert [outcome for outcome in outcomes_of(name, [by_headers], every=250) if outcome.kind in WRONG] == []


@pytest.mark.parametrize("name", ["deepseek_v3, trained", "gpt_oss, MXFP4", "qwen3, trained"])
def test_every_command_asks(name: str):
    """such a tensor and any command that takes the checkpoint: the same"""
    assert [outcome for outcome in outcomes_of(name, [by_commands], every=60) if outcome.kind in WRONG] == []
