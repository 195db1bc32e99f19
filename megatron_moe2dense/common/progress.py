"""Progress bars on stderr, off when stderr is no terminal or on ranks other than 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None, description: str, unit: str = "it", **options: Any) -> tqdm:
    """A tqdm bar over `items` (or `total=` and manual `update`)."""
    hidden = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=description, unit=unit, disable=hidden, dynamic_ncols=True, file=sys.stderr, **options)
