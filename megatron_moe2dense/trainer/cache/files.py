"""A teacher cache on disk: `shard_00000.safetensors`, ... of equally many samples each, beside the manifest that says of what.

Every shard holds log_p [samples, S, k], indices [samples, S, k] (int32) and tail [samples, S] (float32), S tokens a sample. A shard
is complete or absent; sample n is at row n % shard_samples of shard n // shard_samples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import disk_errors, odd_fields, read_manifest
from megatron_moe2dense.trainer.losses.targets import TopKTarget

FORMAT, STAGE = 1, "cache-teacher"


@dataclass(frozen=True)
class CacheFacts:
    """What a cache is of; a run that reads it must agree.

    Attributes:
        teacher: fingerprint of config and weights. tokenizer: sha256 of its file, None where it has none. active: experts per token.
        data: `datasets.identity` of the text. samples, k: sizes. store: type of the log-probabilities. teacher_dtype: `teacher.dtype`.
    """

    teacher: str
    tokenizer: str | None
    vocab_size: int
    active: int | None
    data: dict[str, Any]
    samples: int
    k: int
    store: str
    shard_samples: int
    format: int = FORMAT
    teacher_dtype: str = "model"

    def shard(self, number: int) -> range:
        """Samples of one shard."""
        return range(number * self.shard_samples, min((number + 1) * self.shard_samples, self.samples))

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-self.samples // self.shard_samples)

    def as_manifest(self) -> dict[str, Any]:
        """For moe2dense.json."""
        return {"cache": asdict(self)}

    @classmethod
    def of_manifest(cls, content: dict[str, Any], where: Path) -> CacheFacts:
        """From moe2dense.json; UserError when it is of another format."""
        facts = content.get("cache", {})
        if facts.get("format") != FORMAT:
            found = f"{where}: teacher cache of format {facts.get('format')}"
            raise UserError(found, f"format {FORMAT}", "write it again with this version")
        facts = {"teacher_dtype": "model", **facts}  # of versions that knew no other
        unknown, absent = odd_fields(cls, facts)
        if unknown or absent:
            known = ", ".join(sorted(field.name for field in fields(cls)))
            odd = ", ".join(sorted([*unknown, *absent]))
            raise UserError(f"{where}: {odd} of a teacher cache", f"the fields {known}", "write it again with this version")
        return cls(**facts)


def shard_path(directory: Path, number: int) -> Path:
    """Where a shard is, or will be."""
    return directory / f"shard_{number:05d}.safetensors"


def write_shard(directory: Path, number: int, targets: list[TopKTarget], store: str) -> None:
    """All samples of one shard, one target of S tokens each, in one rename."""
    dtype = getattr(torch, store)
    log_p = torch.stack([target.log_p_TK for target in targets])
    path = shard_path(directory, number)
    partial = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        tensors = {
            "log_p": log_p.clamp_min(torch.finfo(dtype).min).to(dtype),
            "indices": torch.stack([target.indices_TK for target in targets]).int(),
            "tail": torch.stack([target.tail_T for target in targets]),
        }
        with partial.open("wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def tokenizer_hash(directory: Path) -> str | None:
    """sha256 of a model's tokenizer, None where it has none."""
    found = [directory / name for name in ("tokenizer.json", "tokenizer.model") if (directory / name).exists()]
    return hashlib.sha256(found[0].read_bytes()).hexdigest() if found else None


class CacheReader:
    """Reads any sample at the cost of its own bytes; shards are mapped, never loaded.

    Args:
        directory: a finished cache. UserError when it is none.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.facts = CacheFacts.of_manifest(read_manifest(directory, STAGE), directory)
        self._open: dict[int, Any] = {}

    def read(self, samples: Sequence[int], positions_BS: Tensor) -> TopKTarget:
        """The targets of these places of these samples, T = S * B tokens, sequence-major as hidden states are; on the CPU.

        Raises:
            UserError: a shard has gone or is damaged.
        """
        rows = [self._sample(number) for number in samples]
        picked = {
            name: torch.stack([row[name][places_S] for row, places_S in zip(rows, positions_BS.cpu(), strict=True)], 1).flatten(0, 1)
            for name in ("indices", "log_p", "tail")
        }
        return TopKTarget(picked["indices"].long(), picked["log_p"].float(), picked["tail"]).normalised()

    def _sample(self, number: int) -> dict[str, Tensor]:
        shard, row = divmod(number, self.facts.shard_samples)
        path = shard_path(self.directory, shard)
        try:
            if shard not in self._open:
                self._open = {shard: safe_open(path, "pt")}  # training goes through the shards one after the other
            return {name: self._open[shard].get_slice(name)[row] for name in ("indices", "log_p", "tail")}
        except Exception as error:  # safetensors raises its own errors, OSError and IndexError for the ways a file can be damaged
            raise UserError(f"{path}: {error}", "the shard that `cache-teacher` wrote", "copy or write the cache again") from None
