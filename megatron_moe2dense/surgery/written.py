"""How far the writing of a checkpoint came: a small file in its working directory, valid for the same content alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.shards import Shard
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import read_json, write_json

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Written:
    """A checkpoint in the making. done: steps that are on disk."""

    directory: Path
    identity: str
    done: int

    @classmethod
    def find(cls, directory: Path, content: Any, shards: Sequence[Shard], steps: int) -> Written:
        """What an earlier run left of the same content.

        Args:
            content: JSON that the bytes depend on, beside the shards' headers. steps: of the whole checkpoint.
        """
        headers = [shard.header().decode("latin-1") for shard in shards]
        identity = hashlib.sha256(json.dumps([content, headers]).encode()).hexdigest()
        path = directory / PROGRESS_FILE
        found = read_json(path, "progress of an earlier run") if path.exists() else {}
        if found.get("identity") == identity and all(shard.is_laid_out(directory) for shard in shards):
            logger.info("%s: resumed after %d of %d steps", directory, found["steps"], steps)
            return cls(directory, identity, found["steps"])
        path.unlink(missing_ok=True)
        return cls(directory, identity, 0)

    def reached(self, steps: int) -> Callable[[], None]:
        """What records that so many steps are on disk."""
        return lambda: write_json(self.directory / PROGRESS_FILE, {"identity": self.identity, "steps": steps})

    def remove(self) -> None:
        """Everything is written."""
        (self.directory / PROGRESS_FILE).unlink()
