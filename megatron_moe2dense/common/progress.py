"""How far a long stage is: whole lines in the log with done/total, rate and time left, so that a file or a pipe shows what a screen does.

A stage of less than two seconds says nothing; nor do ranks other than 0 (common.log).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from megatron_moe2dense.common.log import logger

Item = TypeVar("Item")
Clock = Callable[[], float]

QUIET = 2.0  # seconds of a stage before its first line
_DRIFT = 1e-6  # of units that are added up in parts
_APART, _SILENCE = 1.0, 30.0  # seconds between two lines: at least, where a whole unit ends; at most, where there is an update at all


def duration(seconds: float) -> str:
    """`38s`, `12m05`, `4h52`, `3d04h`."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole}s"
    if minutes < 60:
        return f"{minutes}m{whole % 60:02d}"
    return f"{hours}h{minutes % 60:02d}" if hours < 24 else f"{days}d{hours % 24:02d}h"


class Pace:
    """How fast something advances since `start` was reached, and how long the rest takes at that pace.

    Args:
        start: what was done when the clock began. clock: seconds.
    """

    def __init__(self, start: float, clock: Clock | None = None):
        self._clock = clock or time.monotonic
        self._start, self._began = start, self._clock()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._began

    def rate(self, done: float) -> float | None:
        """Units a second; None before the first."""
        return (done - self._start) / self.seconds if done > self._start and self.seconds > 0 else None

    def left(self, done: float, total: float) -> str:
        """`ETA 4h52`; empty while nothing is known."""
        rate = self.rate(done)
        return "" if rate is None else f"ETA {duration(max(total - done, 0) / rate)}"


class StepLines:
    """Which steps of a run get a line, and what it says of the time: every so many, the first of this process, and one after each silence.

    Args:
        total: steps of the run. every: steps between lines. clock: seconds.
    """

    def __init__(self, total: int, every: int, clock: Clock | None = None):
        self._total, self._every, self._clock = total, every, clock or time.monotonic
        self._pace: Pace | None = None
        self._said_at = 0.0

    def due(self, step: int) -> bool:
        """Whether the step is one of those that are measured closely."""
        return step == self._total or step % self._every == 0

    def ended(self, step: int, always: bool = False) -> str | None:
        """`step 120/7629` and, once there is a pace, the time left; None for a step without a line. The first step, which loads and
        compiles, is left out of the pace."""
        first = self._pace is None
        if self._pace is None:
            self._pace = Pace(step, self._clock)
        if not (always or first or self.due(step) or self._clock() - self._said_at >= _SILENCE):
            return None
        self._said_at = self._clock()
        left = self._pace.left(step, self._total) if step < self._total else ""
        return f"step {step}/{self._total}{', ' + left if left else ''}"


class Progress:
    """Counts a stage and says so; a context manager, whose regular end says how long it took.

    Args:
        doing: what the line begins with. unit: singular. total: units in all. done: of these, by an earlier run.
        each: a line for each whole unit (a second apart at least); else one after 2 s and then every 10 s. clock: seconds.
    """

    def __init__(self, doing: str, unit: str, total: float, *, done: float = 0, each: bool = False, clock: Clock | None = None):
        self._doing, self._unit, self._total, self._done = doing, unit, total, done
        self._each, self._tokens = each, 0
        self._pace = Pace(done, clock)
        self._said_at, self._said_done = 0.0, done

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()

    def update(self, amount: float = 1, tokens: int = 0) -> None:
        """So many units more, and tokens in them, whose rate is then said too."""
        self._tokens += tokens
        self.reached(self._done + amount)

    def reached(self, done: float) -> None:
        """So many units in all."""
        self._done = done
        seconds = self._pace.seconds
        if seconds < QUIET or self._pace.rate(done) is None or done >= self._total:  # the end has its own line
            return
        apart = (_APART if int(done + _DRIFT) > int(self._said_done + _DRIFT) else _SILENCE) if self._each else 10.0
        if self._said_at and seconds - self._said_at < apart:
            return
        self._said_at, self._said_done = seconds, done
        logger.info("%s: %s", self._doing, ", ".join([*self._facts(), self._pace.left(done, self._total)]))

    def close(self) -> None:
        """The stage has ended well."""
        if self._pace.seconds >= QUIET:
            logger.info("%s: %s, took %s", self._doing, ", ".join(self._facts()), duration(self._pace.seconds))

    def _facts(self) -> list[str]:
        measured = self._unit.isupper()  # MB, of which there are parts
        plural = self._unit if measured else f"{self._unit}s"
        done, total = (_significant(n) if measured else f"{int(n + _DRIFT):,}" for n in (self._done, self._total))
        facts, rate = [f"{done}/{total} {plural}"], self._pace.rate(self._done)
        if rate is not None:
            facts.append(f"{_significant(rate)} {plural}/s" if measured or rate >= 1 else f"{1 / rate:.3g} s/{self._unit}")
        if self._tokens:
            facts.append(f"{_significant(self._tokens / self._pace.seconds)} tokens/s")
        return facts


def _significant(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def progress(
    items: Iterable[Item],
    doing: str,
    unit: str,
    total: float,
    *,
    done: float = 0,
    each: bool = False,
    reached: Callable[[Item], float] | None = None,
) -> Iterator[Item]:
    """The items, counted after what is done with each; see Progress. reached: units in all after an item (None: one an item)."""
    with Progress(doing, unit, total, done=done, each=each) as shown:
        for item in items:
            yield item
            shown.update() if reached is None else shown.reached(reached(item))
