"""What a checkpoint may unpickle: Megatron's `.metadata` is a pickle, its other objects are `torch.save` files, and a pickle can run
any function it names. Here the first is read with the types it is made of alone, the others as weights_only."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import pickle
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moe2dense.common.errors import UserError

METADATA = ".metadata"
# Modules whose dataclasses and enumerations describe tensors, files and who wrote what.
_DESCRIPTIONS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner", "torch.distributed.checkpoint.filesystem")
_SINGLE = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}
# Of torch: makes `torch.load` use weights_only even where the caller asks for more, as torch's checkpoint planner does.
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SINGLE:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        found = getattr(import_module(module), name, None) if module in _DESCRIPTIONS else None
        if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def require_data(path: Path) -> None:
    """UserError when `path`/.metadata is anything but a description of tensors; nothing it names is called."""
    try:
        with (path / METADATA).open("rb") as file:
            _Descriptions(file).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / METADATA}: {error}",
            "the description of a checkpoint's tensors, which names no other code",
            "do not load it: take the checkpoint from the run that wrote it",
        ) from None


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, `torch.load` builds tensors and plain Python data, whoever calls it; UserError when a file holds anything else."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        refused = _refused(error)
        if refused is None:
            raise
        named = re.search(r"GLOBAL (\S+)", str(refused))
        raise UserError(
            f"the checkpoint holds more than data: {named[1] if named else refused}",
            "tensors and plain numbers",
            "do not load it: take the checkpoint from the run that wrote it",
        ) from None
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _refused(error: BaseException) -> BaseException | None:
    """What torch would not unpickle, also where its planner wraps the errors of all ranks; None for other failures."""
    causes = [reason for reason, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return next((cause for cause in causes if isinstance(cause, pickle.UnpicklingError)), None)
