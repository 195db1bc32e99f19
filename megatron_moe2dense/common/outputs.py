"""Atomic outputs: files and directories are written beside their place as `<name>.tmp` and renamed when complete.
Each directory holds `moe2dense.json`: status, stage, resolved config, its hash, source fingerprint, versions."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import megatron_moe2dense
from megatron_moe2dense.common.content import config_hash, identity, inputs
from megatron_moe2dense.common.errors import UserError

MANIFEST = "moe2dense.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
Status = Literal["unfinished", "finished"]


@functools.cache
def versions() -> dict[str, str]:
    """Package, Python and library versions that can change a result; libraries that are absent are left out. Read once: a process does
    not change them."""
    found = {"megatron_moe2dense": megatron_moe2dense.__version__, "python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "tokenizers",
        "megatron-core",
        "transformer-engine",
        "lm-eval",
        "datasets",
        "accelerate",
        "safetensors",
        "numpy",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def commit() -> str | None:
    """The git commit of this package's checkout when first asked for: the code that runs is not that of later ones. None outside a
    checkout and without git."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return result.stdout.strip() or None


def write_text(path: Path, text: str) -> None:
    """Write a file atomically (temporary file in the same folder, fsync, rename)."""
    partial = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, readable and with a final newline."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, expected: str) -> Any:
    """Parse a JSON file; UserError (saying what was `expected`) when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: {error}", expected, "check the path, or make the file again") from None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, broken or read-only disk while writing `path` into a UserError; partial files stay beside, never in place."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f"{error.filename or path}: {os.strerror(error.errno)}",
            "a folder that can be written, on a disk with room",
            "free space or choose another output; what was there before is untouched",
        ) from error


def manifest(status: Status, stage: str, config: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """What says how an output was made; `facts` are stage-specific (source fingerprint, progress, ...). The hash is of the identity, where
    they have one."""
    return {
        "status": status,
        "stage": stage,
        "config": config,
        "config_hash": config_hash(facts.get("identity", config)),
        **facts,
        "versions": versions(),
        "commit": commit(),
    }


def write_manifest(directory: Path, status: Status, stage: str, config: dict[str, Any], **facts: Any) -> None:
    """Write `moe2dense.json` into `directory`."""
    write_json(directory / MANIFEST, manifest(status, stage, config, **facts))


def read_manifest(directory: Path, stage: str) -> dict[str, Any]:
    """The manifest of a finished output of `stage`; UserError when there is none."""
    content = read_own_manifest(directory / MANIFEST, f"the output directory of `moe2dense {stage}` with its {MANIFEST}")
    if content.get("stage") != stage or content.get("status") != "finished":
        raise UserError(
            f"{directory} is {content.get('status')} output of `{content.get('stage')}`",
            f"finished output of `moe2dense {stage}`",
            f"point to the output of `{stage}`, or run it (again) to the end",
        )
    return content


def begun_as(manifest: dict[str, Any]) -> dict[str, Any]:
    """The identity in a manifest, or of the config in one of an earlier version."""
    return manifest.get("identity") or identity(manifest.get("config", {}))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys of two identities that differ, as `a.b: old -> new`."""
    old, new = (dict(_leaves(content, "")) for content in (before, now))
    return [f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}" for name in {**old, **new} if old.get(name) != new.get(name)]


def odd_fields(cls: Any, content: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a file says that a dataclass has no field for, and the fields that it does not have; in alphabetical order."""
    known = {field.name for field in dataclasses.fields(cls)}
    return sorted(content.keys() - known), sorted(known - content.keys())


def _leaves(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    """A fingerprint by its beginning, anything else as JSON."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_short(item)}' for name, item in value.items())}}}"
    return json.dumps(value)


def require_apart(config: dict[str, Any]) -> None:
    """UserError when the output is, or lies around, something that is read: it would be gone when the output is replaced."""
    output = config.get("output")
    if not isinstance(output, str):
        return
    place = Path(output).resolve()
    for name, path in inputs(config):
        read = Path(path).resolve()
        if read == place or place in read.parents:
            where = "is" if read == place else "lies around"
            raise UserError(f"output {output} {where} {name} {path}", "an output beside what is read", "choose another output")


def require_of_stage(output: Path, stage: str) -> None:
    """UserError when another command's output is there, which `overwrite` does not replace."""
    if not (output / MANIFEST).exists():
        return
    found = read_own_manifest(output / MANIFEST, f"the manifest of `{stage}`, or nothing")["stage"]
    if found != stage:
        raise UserError(
            f"{output} is output of `{found}`",
            f"a path that does not exist yet, or an output of `{stage}`",
            "choose another output, or remove it yourself: overwrite=true replaces outputs of the same command",
        )


def claim(output: Path, working: Path, own: dict[str, Any], overwrite: bool) -> bool:
    """Decide what happens to what is already there. Returns True when an unfinished run of the same identity is resumed.

    Args:
        output: the final directory. working: where an unfinished run works (`<output>.tmp`, or `output` itself).
        own: the identity of this run (`common.content`).

    Raises:
        UserError: a finished output, foreign files, or an unfinished run of another config is in the way.
    """
    manifest, foreign = _unfinished(working, working != output), _holds_foreign_files(working)
    before = manifest and begun_as(manifest)
    found = None if before is None else config_hash(before)
    if output.exists() and not overwrite and not (working == output and found is not None):
        what = "is a finished output" if (output / MANIFEST).exists() else "exists"
        raise UserError(f"{output} {what}", "a path that does not exist yet", "choose another output or add overwrite=true")
    if found == config_hash(own):
        return True
    if before is not None and not overwrite:
        raise UserError(
            f"{working} is an unfinished run of another config ({'; '.join(differences(before, own))})",
            "an unfinished run of this config, or nothing",
            "finish it with its own config, choose another output, or add overwrite=true, which deletes it",
        )
    if foreign and not overwrite:
        raise UserError(f"{working} exists", "a path that does not exist yet", "remove it, choose another output or add overwrite=true")
    if working.exists():
        shutil.rmtree(working)
    return False


def read_own_manifest(path: Path, expected: str) -> dict[str, Any]:
    """A manifest, whatever its stage and status; UserError when it is none."""
    content = read_json(path, expected)
    if not isinstance(content, dict) or not {"status", "stage", "config_hash"} <= set(content):
        raise UserError(f"{path} is no manifest", expected, "check the path, or make the output again")
    return content


def _holds_foreign_files(working: Path) -> bool:
    """Whether there is something that no run of ours left: files without a manifest (a run killed at once leaves none)."""
    if not working.is_dir():
        return working.exists()
    names = {item.name for item in working.iterdir()}
    return MANIFEST not in names and bool(names - {MANIFEST + ".tmp"})


def _unfinished(working: Path, complete_too: bool) -> dict[str, Any] | None:
    """The manifest of the run that `working` belongs to. complete_too: also where it was complete and only not yet in its place."""
    if not (working / MANIFEST).exists():
        return None
    content = read_own_manifest(working / MANIFEST, "the manifest of an unfinished run, or nothing")
    return content if complete_too or content.get("status") == "unfinished" else None


@contextlib.contextmanager
def output_directory(output: Path, stage: str, config: dict[str, Any], **facts: Any) -> Iterator[Path]:
    """`with output_directory(...) as working:` - fill `working`; on success it becomes `output`, complete, in one rename.

    `config["overwrite"]` allows replacing what is there. On failure the working directory stays for a resume.
    `facts` go to the manifest.
    """
    overwrite = bool(config.get("overwrite", False))
    require_apart(config)
    require_of_stage(output, stage)
    working, own = output.with_name(output.name + ".tmp"), identity(config)
    claim(output, working, own, overwrite)
    facts = {"identity": own, **facts}
    with disk_errors(output):
        working.mkdir(parents=True, exist_ok=True)
        write_manifest(working, "unfinished", stage, config, **facts)
        yield working
        write_manifest(working, "finished", stage, config, **facts)
        publish(working, output)


def publish(working: Path, output: Path) -> None:
    """Put a complete directory in its place; an old one is moved away first and deleted last."""
    old = output.with_name(output.name + ".old.tmp")
    if old.exists():
        shutil.rmtree(old)
    if output.exists():
        output.rename(old)
    working.rename(output)
    if old.exists():
        shutil.rmtree(old)
