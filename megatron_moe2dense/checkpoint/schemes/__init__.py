"""Readers of quantised weights, one file a scheme: each finds its tensors by what config.json says and by what stands in the files."""

from __future__ import annotations

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.schemes import fp4, packed, scaled
from megatron_moe2dense.checkpoint.schemes.encoded import Encoded
from megatron_moe2dense.checkpoint.schemes.settings import Settings


def encoded_in(index: CheckpointIndex) -> dict[str, Encoded]:
    """By the name of the weight, all that can be decoded: none by a method without a reader, none of a module left out in config.json."""
    settings = Settings.of(index)
    if not settings.readable:
        return {}
    found = {name: encoded for scheme in (fp4, packed, scaled) for name, encoded in scheme.find(index, settings)}
    return {name: encoded for name, encoded in found.items() if not settings.excludes(name.removesuffix(".weight"))}
