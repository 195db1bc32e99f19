"""What a running sweep shows: on a terminal a table that is redrawn after each pass, else a log line."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_moe2dense.common.log import logger

_SHOWN = 10


class LiveTable:
    """Context manager around the passes. plans: how many distinct ones the whole sweep has, of all slices."""

    def __init__(self, plans: int, console: Console | None = None):
        self._plans, self._start = plans, time.monotonic()
        console = console or Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        sys.stderr.flush()

    def update(self, rows: Mapping[int, dict[str, Any]]) -> None:
        """After a pass: all records so far, of all processes."""
        done = [row for row in rows.values() if "same_plan_as" not in row]
        best = sorted(done, key=lambda row: row["metrics"]["kl"])
        title = f"{len(done)} of {self._plans} plans, {time.monotonic() - self._start:.0f} s"
        if self._live is None:
            metrics = best[0]["metrics"]
            logger.info("%s; best %s: KL %.4f, perplexity %.2f", title, best[0]["model"], metrics["kl"], metrics["perplexity"])
            return
        shown = Table(title=title, title_justify="left")
        for name in ("configuration", "KL [nats]", "perplexity", "top-1 agreement"):
            shown.add_column(name, justify="left" if name == "configuration" else "right")
        for row in best[:_SHOWN]:
            metrics = row["metrics"]
            shown.add_row(row["model"], f"{metrics['kl']:.4f}", f"{metrics['perplexity']:.2f}", f"{metrics['top1_agreement']:.4f}")
        self._live.update(shown, refresh=True)
