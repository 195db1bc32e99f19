"""The checksums of a checkpoint directory: size and SHA-256 of each of its files, written last and checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_moe2dense.common.outputs import write_json

LISTING = "files.json"
Digest = dict[str, Any]


def digest(path: Path) -> Digest:
    """Size [bytes] and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write(directory: Path, digests: Mapping[str, Digest]) -> None:
    """List the files of `directory`: `digests` of those that others have read already, by name; the rest is read here."""
    names = sorted(path.name for path in directory.iterdir())
    write_json(directory / LISTING, {name: digests[name] if name in digests else digest(directory / name) for name in names})


def broken(directory: Path, share: slice) -> str | None:
    """What is wrong with the list, or with the files of this share of its list; None when nothing is."""
    try:
        listed = json.loads((directory / LISTING).read_bytes())
        strangers = {path.name for path in directory.iterdir()} - {LISTING, *listed}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{directory / LISTING}: {error}"
    if strangers:
        return f"{directory / min(strangers)} is not in {LISTING}"
    return next(_faults(directory, list(listed.items())[share]), None)


def _faults(directory: Path, files: Iterable[tuple[str, Digest]]) -> Iterator[str]:
    for name, expected in files:
        path = directory / name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{path} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        elif digest(path) != expected:
            yield f"{path} holds other bytes than were written"
