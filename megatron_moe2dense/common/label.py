"""Method blocks in short, for tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def label(block: Mapping[str, Any] | None) -> str:
    """A block's method, and in brackets its options that are set: `ols(prefilter=2.0)`; "none" without a block."""
    return "none" if block is None else str(block["method"]) + _options(block)


def _options(block: Mapping[str, Any]) -> str:
    given = {name: value for name, value in block.items() if name != "method" and value not in (None, "none")}
    said = [f"{name}{_options(value)}" if isinstance(value, Mapping) else f"{name}={value}" for name, value in given.items()]
    return f"({', '.join(said)})" if said else ""
