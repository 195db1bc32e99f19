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
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

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
    """Builds what `_DESCRIPTIONS` and `_SINGLE` name, from the form of every interpreter that trains: 3.11.0 to 3.11.3 pickle a member of
    an enumeration as `getattr` of its class, others as a call of its class; 3.13 calls `pathlib` `pathlib._local`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        module = "pathlib" if module == "pathlib._local" else module
        if (module, name) in _SINGLE:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        found = getattr(import_module(module), name, None) if module in _DESCRIPTIONS else None
        if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _member(enumeration: Any, name: Any) -> enum.Enum:
    """Takes the place of `getattr`, for the one thing that a description may ask of it; UnpicklingError for anything else."""
    if isinstance(enumeration, type) and issubclass(enumeration, enum.Enum) and isinstance(name, str) and name in enumeration.__members__:
        return enumeration.__members__[name]
    raise pickle.UnpicklingError(f"it names builtins.getattr, of {enumeration!r:.60}")


class _Portable(pickle.Pickler):
    """Members of enumerations as calls of their class with their value, and paths as text, whatever this interpreter's own way is."""

    def reducer_override(self, obj: Any) -> Any:
        return (type(obj), (obj.value,)) if isinstance(obj, enum.Enum) else NotImplemented


def read(file: IO[bytes]) -> Metadata:
    """The description of a checkpoint's tensors and files; pickle.UnpicklingError when it is anything else. Nothing it names is called."""
    found = _Descriptions(file).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"it is a {type(found).__name__}")
    return found


def make_portable(path: Path) -> None:
    """Write `path`/.metadata anew in a form that does not depend on this interpreter: stock torch reads it under every other."""
    with (path / METADATA).open("rb") as file:
        description = read(file)
    if description.storage_meta is not None and description.storage_meta.checkpoint_id is not None:
        description.storage_meta.checkpoint_id = os.fspath(description.storage_meta.checkpoint_id)
    with (path / METADATA).open("wb") as file:
        _Portable(file, protocol=4).dump(description)


def require_data(path: Path) -> None:
    """UserError when `path`/.metadata is anything but a description of tensors; nothing it names is called."""
    try:
        with (path / METADATA).open("rb") as file:
            read(file)
    except (pickle.UnpicklingError, AttributeError, EOFError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / METADATA}: {error}",
            "the description of a checkpoint's tensors, which names no other code",
            "do not load it: take the checkpoint from the run that wrote it",
        ) from None


@contextlib.contextmanager
def as_data() -> Iterator[None]:
    """Inside, `torch.load` builds tensors and plain Python data, and torch's checkpoint reader reads `.metadata` by `read`, whoever calls
    them; UserError when a file holds anything else."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    filesystem.pickle = SimpleNamespace(load=read)  # type: ignore[assignment] - all that the reader takes of it
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
        filesystem.pickle = pickle  # type: ignore[attr-defined]
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _refused(error: BaseException) -> BaseException | None:
    """What torch would not unpickle, also where its planner wraps the errors of all ranks; None for other failures."""
    causes = [reason for reason, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return next((cause for cause in causes if isinstance(cause, pickle.UnpicklingError)), None)
