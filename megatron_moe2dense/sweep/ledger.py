"""The output directory of a sweep, shared by any number of processes. A plan is claimed by a lock on one byte of a file, which the kernel
drops with its process, however that ends; what is recorded stays."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_moe2dense.common import records
from megatron_moe2dense.common.content import identity
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import MANIFEST, begun_as, differences, disk_errors, read_json, require_apart, write_manifest
from megatron_moe2dense.sweep.config import SweepConfig

RECORDS, SUMMARY = "records.jsonl", "summary.json"
_LOCKS, REFITS = ".locks", ".refits"
_DO = "choose another output, or add overwrite=true (with slices: remove the directory first)"


class Ledger:
    """What is done, and who does what.

    Args:
        facts: what is measured on what; a sweep of other things does not mix with this one.

    Raises:
        UserError: the directory is finished, of another config, or not ours.
    """

    def __init__(self, config: SweepConfig, facts: dict[str, Any]):
        self.directory = Path(config.output)
        self._sweep = config
        self._facts = {"identity": of_sweep(config), **facts}
        require_apart(_config(config))
        require_free(config, facts)
        with disk_errors(self.directory):
            if config.overwrite and self.directory.exists():
                shutil.rmtree(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            # One descriptor: closing any other one of this file would drop the process's locks (POSIX).
            self._locks = (self.directory / _LOCKS).open("wb")
            with self.locked():
                require_free(config.model_copy(update={"overwrite": False}), facts)
                if not (self.directory / MANIFEST).exists():
                    write_manifest(self.directory, "unfinished", "sweep", _config(config), **self._facts)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the sweep's processes."""
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, 0)

    @contextmanager
    def claimed(self, plans: Sequence[int], at_most: int) -> Iterator[list[int]]:
        """Up to so many of the plans (by number) that no other process works on, this process's until the block ends."""
        held: list[int] = []
        try:
            for plan in plans:
                if len(held) < at_most:
                    with suppress(BlockingIOError, PermissionError):  # another process's; which of the two differs by system
                        fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 + plan)
                        held.append(plan)
            yield held
        finally:
            for plan in held:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, 1 + plan)

    def rows(self) -> dict[int, dict[str, Any]]:
        """All records so far, of all processes, by the number of their point, in the order of the grid."""
        return read_rows(self.directory)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Record a pass; each row is on disk whole, or not there."""
        for row in rows:
            records.append(self.directory / RECORDS, row)

    def finish(self) -> None:
        """Mark the output as complete; call inside `locked`."""
        write_manifest(self.directory, "finished", "sweep", _config(self._sweep), **self._facts)
        (self.directory / _LOCKS).unlink(missing_ok=True)
        shutil.rmtree(self.directory / REFITS, ignore_errors=True)  # of processes that were killed


def of_sweep(config: SweepConfig) -> dict[str, Any]:
    """The identity of the whole sweep: which part of it a process does is no part of it."""
    return identity(_config(config))


def _config(config: SweepConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"slice", "overwrite"})


def read_rows(directory: Path) -> dict[int, dict[str, Any]]:
    """The records of a sweep's directory by the number of their point, in the order of the grid; none when there is no file yet."""
    path = directory / RECORDS
    found = {row["point"]: row for row in records.read(path)} if path.exists() else {}
    return dict(sorted(found.items()))


def require_free(config: SweepConfig, facts: dict[str, Any]) -> None:
    """UserError unless the output does not exist yet or is an unfinished sweep of this config and these facts (overwrite: any sweep)."""
    directory = Path(config.output)
    names = {item.name for item in directory.iterdir()} if directory.is_dir() else set()
    if not directory.exists() or (directory.is_dir() and names <= {_LOCKS, MANIFEST + ".tmp"}):
        return
    if MANIFEST not in names:
        raise UserError(f"{directory} exists", "a path that does not exist yet", "choose another output")
    found = read_json(directory / MANIFEST, "the manifest of a sweep")
    if found.get("stage") != "sweep":
        raise UserError(f"{directory} is output of `{found.get('stage')}`", "a sweep, or a path that does not exist yet", _DO)
    if config.overwrite:
        return
    changed = differences({**begun_as(found), **_measured(found, facts)}, {**of_sweep(config), **_measured(facts, facts)})
    if changed:
        raise UserError(f"{directory} is a sweep of another config ({'; '.join(changed)})", "an unfinished sweep of this one", _DO)
    if found["status"] == "finished":
        raise UserError(f"{directory} is a finished output", "a path that does not exist yet", _DO)


def _measured(found: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Of a manifest's facts, what is measured on what, without the path of the source."""
    told = {name: found.get(name) for name in facts}
    return {**told, "source": {name: value for name, value in (told["source"] or {}).items() if name != "path"}}
