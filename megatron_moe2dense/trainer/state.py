"""Progress of a run: what a checkpoint restores besides weights and optimizer, skipped steps and the recent losses among it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import odd_fields

# A spike is told from the median of so many last finite losses, and only once there are the fewest.
_WINDOW, _FEWEST = 64, 8


@dataclass
class TrainState:
    """The same on every rank.

    Attributes:
        step: finished steps. tokens: unmasked tokens seen. recent: the last finite losses [nats per token], the newest last.
        skipped_total: steps without an update because loss or gradients were not finite. skipped_in_a_row: those since the last update.
    """

    step: int = 0
    tokens: int = 0
    skipped_total: int = 0
    skipped_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)

    @classmethod
    def restored(cls, progress: dict[str, Any], where: str) -> TrainState:
        """From a checkpoint; UserError when it has other fields than this version, naming them."""
        unknown, absent = odd_fields(cls, progress)
        if unknown or absent:
            named = "; ".join([*(f"unknown field {name}" for name in unknown), *(f"no field {name}" for name in absent)])
            raise UserError(
                f"{where}: {named}",
                f"the progress of a run: {', '.join(sorted(field.name for field in fields(cls)))}",
                "go on with the version that wrote it",
            )
        return cls(**progress)

    def advance(self, tokens: int, loss: float, updated: bool) -> None:
        """Count one step."""
        self.step += 1
        self.tokens += tokens
        self.skipped_total += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        if math.isfinite(loss):
            self.recent = [*self.recent, loss][-_WINDOW:]

    def median_loss(self) -> float | None:
        """Median of the recent losses, None while there are too few."""
        return statistics.median(self.recent) if len(self.recent) >= _FEWEST else None
