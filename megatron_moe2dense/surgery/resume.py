"""What of a calibration is on disk: the sums of every finished layer and the hidden states after the last of them. All of it lies in
one folder of the working directory; a file is there complete or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import read_json, write_json
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.stats import LayerStats, load_layers, save_stats

_FOLDER, _PROGRESS = "resume", "progress.json"


class Resume:
    """The state of a calibration in `working`, shared by all ranks.

    Args:
        identity: everything the sums depend on; the state of a run of another identity is thrown away.
        memory_budget: bytes of hidden states a rank holds in memory at most.
    """

    def __init__(self, working: Path, identity: Any, ranks: Ranks, memory_budget: int):
        self._folder, self._ranks = working / _FOLDER, ranks
        self.place = HiddenPlace(self._folder, memory_budget, f"hidden-{ranks.rank:04d}")
        self._identity = hashlib.sha256(json.dumps([identity, ranks.world], sort_keys=True).encode()).hexdigest()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / _PROGRESS
        found = read_json(path, "progress of an earlier run") if path.exists() else {}
        start = found["layers"] if found.get("identity") == self._identity else 0
        self.start = ranks.least(start if start and self.place.path(start).exists() else 0)
        if self.start:
            logger.info("%s: resumed after %d layers", working, self.start)

    def finish_layer(self, layer: int, stats: LayerStats | None, hidden: HiddenStates) -> None:
        """Record that `layer` is done. stats: its sums over all ranks, None for a layer without experts."""
        if self._ranks.rank == 0 and stats is not None:
            path = self._stats(layer)
            partial = path.with_suffix(".tmp")
            save_stats(partial, {layer: stats})
            partial.replace(path)
        self._ranks.wait()
        if self._ranks.rank == 0:
            write_json(self._folder / _PROGRESS, {"identity": self._identity, "layers": layer + 1})
        self._ranks.wait()
        hidden.forget_others()

    def sums(self, layer: int) -> LayerStats:
        """The sums of a finished layer."""
        return load_layers(self._stats(layer))[layer]

    def remove(self) -> None:
        """Everything is in the output: drop the state."""
        self._ranks.wait()
        if self._ranks.rank == 0:
            shutil.rmtree(self._folder)

    def _stats(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.safetensors"
