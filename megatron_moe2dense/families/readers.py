"""What config.json says twice, for readers older than transformers 5: they pass over keys that they do not know, and take their own default
without a word (transformers 4.57: rotary frequencies of base 10,000, where the file says 1,000,000 under `rope_parameters` alone)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a config says of where it came from and how it is stored.
_OF_FILES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config")


def differences(meant: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """Keys of a config, as `to_dict` gives it, that another reader of its file takes for something else."""
    found = []
    for name, value in meant.items():
        if name == "text_config":
            found += [f"text_config.{inner}" for inner in differences(value, read.get(name) or {})]
        elif name not in _OF_FILES and read.get(name) != value:
            found.append(f"{name}: {value} is read as {read.get(name)}")
    return found


def for_all_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json with `rope_theta`, `rope_scaling` and `torch_dtype` beside the keys that took their places in
    transformers 5, whose classes read both alike. Where kinds of layers have rotary embeddings of their own, each class had other names for
    them: these stay.
    """
    written = {name: for_all_readers(value) if name == "text_config" else value for name, value in config.items()}
    if isinstance(written.get("dtype"), str):
        written["torch_dtype"] = written["dtype"]
    rope = written.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return written
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    written["rope_theta"] = rope["rope_theta"]
    written["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "partial_rotary_factor" in rope:
        written["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return written
