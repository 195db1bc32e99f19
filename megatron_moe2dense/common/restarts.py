"""What torchrun's restarts have to know: an error that only the user can mend comes back each time, so its ranks need not start again."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_moe2dense.common.errors import UserError

# launch/node.sh sets it to a file that all nodes see.
_VARIABLE = "MOE2DENSE_USER_ERROR"


def noted() -> bool:
    """Whether an earlier start of this job ended with a UserError. False outside launch/node.sh."""
    place = os.environ.get(_VARIABLE)
    return place is not None and Path(place).exists()


def note(error: UserError) -> None:
    """Leave the message for later starts of this job and for launch/*.sh; nothing outside launch/node.sh."""
    place = os.environ.get(_VARIABLE)
    if place is not None:
        Path(place).write_text(f"moe2dense: error\n{error}\n", encoding="utf-8")
