"""Checkpoints with one tensor that is not as it should be: a part of tests.cases.fuzz, whose whole takes hours (`make fuzz`)."""

from __future__ import annotations

import pytest

from tests.cases.fuzz import SUBJECTS, WRONG, of_subject

EVERY = 500


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_tensor_is_not_as_it_should_be(name: str):
    """a tensor absent, of another shape or type, NaN, or there twice: what stock transformers gives, or exit 2 and the tensor's name"""
    assert [outcome for outcome in of_subject(name, EVERY) if outcome.kind in WRONG] == []
