"""What `make serving` takes for worse than before."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.every_engine import worse


def row(verdict: str, engine: str = "vllm") -> dict[str, Any]:
    return {"engine": engine, "weights": "float32", "verdict": verdict, "reason": "its own words"}


@pytest.mark.parametrize(
    ("now", "before", "counts"),
    [
        ("same", "same", False),
        ("same", "different", False),
        ("different", "different", False),
        ("not served", "not served", False),
        ("different", "same", True),
        ("not served", "same", True),
        ("different", None, True),
        ("broken", "broken", True),
    ],
)
def test_what_is_worse(now: str, before: str | None, counts: bool) -> None:
    found = worse({"a": [row("same", "llama_cpp"), row(now)]}, {"a": [row(before)]} if before else {})
    assert found == ([f"a in vllm float32: {now}, its own words"] if counts else [])
