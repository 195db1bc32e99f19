"""Puts checkpoints on disk, one at a time, behind the training: forked writers, then the checksums, then one rename on rank 0."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import disk_errors
from megatron_moe2dense.trainer.agreement import raise_on_all_ranks
from megatron_moe2dense.trainer.checkpoints import checksums, pickles
from megatron_moe2dense.trainer.runtime import upstream

_NAME = re.compile(r"step_(\d{8})")
_DIGESTS = "digests_{rank}.json"


def complete(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first. Half-written ones end in .tmp and never match."""
    return sorted(path for path in directory.glob("step_*") if _NAME.fullmatch(path.name))


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step, None when there is none."""
    return max(complete(directory), default=None)


def step_of(path: Path) -> int:
    """The step a checkpoint was taken after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path} is no checkpoint", "a folder like step_00000100", "point to a run directory or one of its checkpoints")
    return int(match[1])


class Writer:
    """At most one save is in flight; every method is called by all ranks at the same step.

    Args:
        directory: `<output>/checkpoints`. keep: how many complete checkpoints stay.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory, self._keep = directory, keep
        self._queue = AsyncCallsQueue()
        self._final: Path | None = None

    def start(self, step: int, content: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Begin to write `content` as `step_N`; returns when its tensors may change again.

        On a GPU they have been copied to host memory then; on a CPU the writers are forks, which keep the pages that training replaces.

        Raises:
            UserError: the save before failed, or the directory can not be written.
        """
        self.wait()
        self._final = self._directory / f"step_{step:08d}"
        assert not self._final.exists(), "a run never comes to the same step twice"
        partial = self._make_partial(self._final)
        with disk_errors(self._final):
            options = {"async_sharded_save": True, "content_metadata": metadata, **upstream.own_checkpoint_writers()}
            request = dist_checkpointing.save(content, str(partial), **options)
        assert request is not None
        self._queue.schedule_async_request(_with_checksums(request, partial, functools.partial(self._publish, partial, self._final)))

    def poll(self) -> None:
        """Publish the save in flight if all ranks have written; UserError when it failed."""
        if self._final is not None:
            self._finish(blocking=False)

    def wait(self) -> None:
        """Return when nothing is in flight any more; UserError when it failed."""
        if self._final is not None:
            self._finish(blocking=True)

    def _make_partial(self, final: Path) -> Path:
        # The name is new each time: writers of a run that was killed may live on for a moment, and must not write into this one.
        name: list[Any] = [f"{final.name}.{uuid.uuid4().hex[:8]}.tmp"]
        dist.broadcast_object_list(name)
        partial = final.with_name(name[0])
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                with disk_errors(final):
                    for stale in self._directory.glob("step_*.tmp"):
                        shutil.rmtree(stale, ignore_errors=True)
                    partial.mkdir(parents=True)
        return partial

    def _finish(self, blocking: bool) -> None:
        assert self._final is not None
        final, self._final = self._final, None
        with raise_on_all_ranks():
            try:
                if not self._queue.maybe_finalize_async_calls(blocking):
                    self._final = final
            except CheckpointException as error:  # raised on all ranks, with the reasons on the first
                raise _not_written(final, error) from error

    def _publish(self, partial: Path, final: Path) -> None:
        """Runs on every rank when all of them have written."""
        part = partial / _DIGESTS.format(rank=dist.get_rank())
        own = json.loads(part.read_text()) if part.exists() else {}
        part.unlink(missing_ok=True)
        everyone: list[dict[str, checksums.Digest]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, everyone)
        with raise_on_all_ranks(), disk_errors(final):
            if everyone is not None:
                pickles.make_portable(partial)
                upstream.write_common(partial)
                checksums.write(partial, {name: found for digests in everyone for name, found in digests.items()})
                partial.rename(final)
                for path in complete(self._directory)[: -self._keep]:
                    # out of the way first: a deletion that is killed must not leave something that looks like a checkpoint
                    shutil.rmtree(path.rename(path.with_name(f"{path.name}.old.tmp")))


def _not_written(final: Path, error: CheckpointException) -> UserError:
    reasons = {str(reason).removeprefix("Worker failure: ") for reason, _ in error.failures.values()}
    return UserError(
        f"{final} could not be written: {', '.join(sorted(reasons)) or 'another rank failed'}",
        "a disk with room that can be written, and memory for the writers",
        "make room; the checkpoints before it are intact, and the same command continues from the last",
    )


def _with_checksums(request: AsyncRequest, partial: Path, publish: Callable[[], None]) -> AsyncRequest:
    request.add_finalize_fn(publish)
    if request.async_fn is None:  # nothing to write on this rank
        return request
    return request._replace(async_fn=functools.partial(_write_and_digest, request.async_fn, partial))


def _write_and_digest(write: Callable[..., None], partial: Path, rank: int, buckets: list[Any], results: Any) -> None:
    """In the forked writer: write, then read the files back while they are in the page cache."""
    upstream.write_and_tell(write, rank, buckets, results)
    with contextlib.suppress(OSError):  # a failed write is reported through `results`
        digests = {Path(path).name: checksums.digest(Path(path)) for path, _, _ in buckets}
        (partial / _DIGESTS.format(rank=rank)).write_text(json.dumps(digests))
