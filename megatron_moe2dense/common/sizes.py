"""Amounts of memory in configs: a number of bytes, or text such as `8GiB`, `500 MB`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS = {"B": 1, **{f"{letter}{i}B": (1024 if i else 1000) ** n for n, letter in enumerate("KMGT", 1) for i in ("", "i")}}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """`8GiB`, `1.5 GB` or an integer to bytes; other types pass through for pydantic to judge. ValueError for other text."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    units = {name.upper(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].upper() not in units:
        raise ValueError(f"{value!r} is no size; write bytes as a number, or text like 8GiB, 500MB")
    return int(float(match[1]) * units[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
