"""What a config asks for: inputs stand there by their content, not by their paths, so that they may move, and copies are they."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_moe2dense.common.errors import UserError

# Keys of inputs: files, folders, prefixes of token files; one, a list, or by label.
_BY_LABEL = "models"
_INPUTS = {
    *("source", "statistics", "plan", "plans", "path", "teacher", "student", "cache", "tokenizer", "checkpoint", "records", "tasks"),
    _BY_LABEL,
}
# They say where a result goes, what is in its way and what it may take, nothing of what it is.
_NO_CONTENT = ("output", "overwrite", "memory_budget")
# What a key says that earlier versions did not have: nothing is padded.
_AS_WITHOUT = {"pad_to": 1}
_SAMPLES, _SAMPLE_BYTES = 64, 16 * 1024


def config_hash(config: dict[str, Any]) -> str:
    """A short hash of a config or of its identity; keys that say nothing about the content are left out."""
    return hashlib.sha256(json.dumps(_of_content(config), sort_keys=True).encode()).hexdigest()[:16]


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved config with the content of its inputs (`fingerprint`) in the place of their paths; a path that is none stays as it is."""
    return {name: _identity(name, value) for name, value in _of_content(config).items()}


def inputs(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, path) of everything that a config reads and that is here."""
    yield from ((name, path) for name, path in _inputs(config, None) if Path(path).exists() or _token_files(path))


def _inputs(value: Any, name: str | None) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _inputs(item, name if name == _BY_LABEL else inner)
    elif isinstance(value, list):
        for item in value:
            yield from _inputs(item, name)
    elif name in _INPUTS and isinstance(value, str):
        yield name, value


def _of_content(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _NO_CONTENT and _AS_WITHOUT.get(name) != value}


def _identity(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _identity(name if name == _BY_LABEL else inner, item) for inner, item in value.items()}
    if name not in _INPUTS:
        return value
    if isinstance(value, list):
        return [_identity(name, item) for item in value]
    return fingerprint(_located(value)) or value if isinstance(value, str) else value


def _located(value: str) -> str:
    """Of a model by its name on the Hugging Face Hub, its folder in the cache."""
    from megatron_moe2dense.common import hub  # which writes outputs itself

    with contextlib.suppress(UserError):
        return str(hub.located(value))
    return value


def fingerprint(path: str) -> str | None:
    """SHA-256 of the names below a folder (of a file or a prefix of token files: none), and of each file's length and 64 samples of
    16 KiB: cheap on 60 GB, tells results apart. None where nothing is there."""
    place = Path(path)
    files = _files(place) if place.is_dir() else {"": place, **_data_of_task(place)} if place.is_file() else _token_files(path)
    if not files:
        return None
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        for sample in _samples(file):
            digest.update(sample)
    return digest.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Those directly in it: a run's checkpoints lie deeper, and grow."""
    return {file.name: file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}


def _data_of_task(file: Path) -> dict[str, Path]:
    """The files that a task of lm-eval reads, where its YAML names them as they are."""
    if file.suffix != ".yaml":
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        named = content["dataset_kwargs"]["data_files"]
        places = [Path(each) for each in (named.values() if isinstance(named, dict) else [named])]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):  # with functions in it, or of data on the Hub
        return {}
    return {place.name: place for place in places if place.is_file()}


def _token_files(prefix: str) -> dict[str, Path]:
    found = {end: Path(prefix + end) for end in (".bin", ".idx")}
    return found if all(file.is_file() for file in found.values()) else {}


def _samples(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            yield handle.read()
            return
        for i in range(_SAMPLES):
            handle.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            yield handle.read(_SAMPLE_BYTES)
