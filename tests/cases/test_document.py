"""The table of cases in docs/operations.md."""

from __future__ import annotations

from tests.cases.document import DOCUMENT, cases, written


def test_the_document_has_every_case():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert written(text) == text, "run python -m tests.cases.document"


def test_every_case_says_what_happens():
    assert not [case for case in cases() if not all(case) or "|" in "".join(case)]
