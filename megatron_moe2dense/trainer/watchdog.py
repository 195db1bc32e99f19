"""Notices a rank that stops answering, and says which: every rank tells the job's store how far it is, a thread of each reads that when
no step ends for `train.timeout`. A collective alone would wait on, or say no more than that it waited."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

import megatron_moe2dense
from megatron_moe2dense.common.errors import UserError

# BSD's EX_TEMPFAIL: nothing to mend in the config, the same command may succeed.
EXIT_CODE = 75
_PACKAGE = str(Path(megatron_moe2dense.__file__).parent)
_STORE_SECONDS = 5.0  # for one answer of the store
_MOST_NAMED = 8  # ranks of one message


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself.

    Attributes:
        count: counts up as long as the process runs. step: last one it had finished. at: line of this package its main thread was in.
    """

    host: str
    process: int
    count: int
    step: int
    at: str


class Watchdog:
    """Of this rank over the others; does nothing in a job of one process.

    Args:
        seconds: without the end of a step, an evaluation or a save on this rank, after which the job is ended.
    """

    def __init__(self, seconds: float):
        self._seconds, self._rank, self._ranks = seconds, dist.get_rank(), dist.get_world_size()
        self._interval = min(seconds / 10, 10.0)
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._step, self._count, self._reached = 0, 0, monotonic()

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Inside, a rank that stops answering ends this process with exit code 75 and a message. step: finished ones so far."""
        self.reached(step)
        if self._ranks == 1:
            yield
            return
        store = _own_connection()
        self._tell(store)
        dist.barrier()  # every rank has told once: nobody waits for a heartbeat that was never given
        thread = threading.Thread(target=self._watch, args=(store,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def reached(self, step: int) -> None:
        """This rank goes on: `step` steps are finished."""
        self._step, self._reached = step, monotonic()

    def _watch(self, store: Store) -> None:
        while not self._ended.wait(self._interval):
            try:
                self._tell(store)
                if monotonic() - self._reached < self._seconds:
                    continue
                before = self._heartbeats(store)
                if self._ended.wait(3 * self._interval):
                    return
                self._tell(store)
                problem = late(before, self._heartbeats(store), self._seconds)
            except (dist.DistError, TimeoutError) as error:
                problem = _no_store(error, self._seconds)
            if monotonic() - self._reached >= self._seconds:
                self._end(problem)

    def _end(self, problem: UserError) -> None:
        """The main thread is inside a collective that never returns: nothing but the process can be ended."""
        print(f"moe2dense: error on rank {self._rank} ({socket.gethostname()})\n{problem}", file=sys.stderr, flush=True)
        # the other ranks find the same; one that goes at once would cut them off before they say so
        if not self._ended.wait(2 * self._interval):
            os._exit(EXIT_CODE)

    def _tell(self, store: Store) -> None:
        self._count += 1
        heartbeat = Heartbeat(socket.gethostname(), os.getpid(), self._count, self._step, _at(sys._current_frames().get(self._main or 0)))
        _answer(lambda: store.set(_key(self._rank), json.dumps(asdict(heartbeat))))

    def _heartbeats(self, store: Store) -> list[Heartbeat]:
        keys = [_key(rank) for rank in range(self._ranks)]
        return [Heartbeat(**json.loads(content)) for content in _answer(lambda: store.multi_get(keys))]


def late(before: list[Heartbeat], after: list[Heartbeat], seconds: float) -> UserError:
    """Which ranks hold up the job, from two looks at all heartbeats, a few intervals apart.

    A rank whose count has not changed has stopped, or its machine has. Where all run, those with the fewest steps are named, or, when
    these are even, where each rank is: the place that few are at is the one to look at.
    """
    silent = [rank for rank, (one, other) in enumerate(zip(before, after, strict=True)) if one.count == other.count]
    behind = [rank for rank, heartbeat in enumerate(after) if heartbeat.step < max(heartbeat.step for heartbeat in after)]
    if silent:
        found = f"no answer from {_named(silent, after)}"
    elif behind:
        found = f"all ranks run, but behind the others: {_named(behind, after)}"
    else:
        places: dict[str, list[int]] = {}
        for rank, heartbeat in enumerate(after):
            places.setdefault(heartbeat.at, []).append(rank)
        fewest = min(places.values(), key=len)
        found = f"all ranks run and none gets on; first to look at: {_named(fewest, after)}"
    return UserError(
        f"no step ended for {seconds:g} s; {found}",
        "a step, an evaluation or a save of all ranks within train.timeout",
        "look at these machines, then start the same command again: it continues from the last checkpoint. "
        "Raise train.timeout if a step, an evaluation or a save may take so long",
    )


def _named(ranks: list[int], heartbeats: list[Heartbeat]) -> str:
    said = []
    for rank in ranks[:_MOST_NAMED]:
        last = heartbeats[rank]
        said.append(f"rank {rank} (process {last.process} on {last.host}, last heard of after step {last.step} in {last.at})")
    more = [f"{len(ranks) - _MOST_NAMED} more"] if len(ranks) > _MOST_NAMED else []
    return ", ".join([*said, *more])


def _no_store(error: BaseException, seconds: float) -> UserError:
    host = os.environ.get("MASTER_ADDR", "the first node")
    return UserError(
        f"no step ended for {seconds:g} s, and the job's store on {host} does not answer: {str(error).splitlines()[0]}",
        "the process that holds the store: torchrun's agent, or rank 0",
        "look at that machine, then start the same command again: it continues from the last checkpoint",
    )


def _answer(question: Callable[[], Any]) -> Any:
    """Of the store; TimeoutError when it gives none: a store whose process is stopped keeps its connections, and keeps us waiting."""
    asked: Future[Any] = Future()
    threading.Thread(target=_settle, args=(asked, question), name="watchdog's question", daemon=True).start()
    try:
        return asked.result(_STORE_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"not within {_STORE_SECONDS:g} s") from None


def _settle(asked: Future[Any], question: Callable[[], Any]) -> None:
    try:
        asked.set_result(question())
    except BaseException as error:
        asked.set_exception(error)


def _at(frame: FrameType | None) -> str:
    """The innermost line of this package on a stack."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "code of others"
    return f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"


def _key(rank: int) -> str:
    return f"moe2dense/heartbeat/{rank}"


def _own_connection() -> Any:
    """To the job's store: the main thread may hold the default one in a wait."""
    store: Any = _get_default_store()
    return store.clone()
