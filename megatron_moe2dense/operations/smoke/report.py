"""Rows of the smoke run and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe2dense.common.table import render


@dataclass(frozen=True)
class Row:
    """One check. passed: None for a figure that nothing is asked of."""

    check: str
    found: str
    passed: bool | None = None
    wanted: str = ""


def report(rows: Sequence[Row]) -> str:
    """Every check with PASS or FAIL, and the count of both."""
    word = {True: "PASS", False: "FAIL", None: "-"}
    cells = [[row.check, row.found, row.wanted or "-", word[row.passed]] for row in rows]
    failed = sum(row.passed is False for row in rows)
    passed = sum(row.passed is True for row in rows)
    return f"{render(['check', 'found', 'wanted', ''], cells)}\n\n{'FAIL' if failed else 'PASS'}: {passed} passed, {failed} failed"


def exit_code(rows: Sequence[Row]) -> int:
    """0 when at least one check passed and none failed, else 1."""
    return 0 if any(row.passed for row in rows) and all(row.passed is not False for row in rows) else 1
