"""A teacher cache in place of the teacher: refused unless it is of this very run, then read a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.cache.files import CacheFacts, CacheReader, tokenizer_hash
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.datasets import identity
from megatron_moe2dense.trainer.data.samples import Batch
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses.targets import TopKTarget


@dataclass(frozen=True)
class CachedTeacher:
    """`Teacher` whose targets were computed before; it knows the training samples alone."""

    reader: CacheReader
    groups: Groups
    device: torch.device

    def targets(self, batches: list[Batch]) -> list[Batch]:
        """See `Teacher.targets`: which samples to read; they are read when the student's hidden states are there."""
        return batches if self.groups.is_last_stage else []

    def output(self, target: Batch) -> TopKTarget:
        """See `Teacher.output`."""
        found = self.reader.read(target.samples, target.positions)
        return TopKTarget(*(part.to(self.device) for part in (found.indices_TK, found.log_p_TK, found.tail_T)))

    def of_other_text(self) -> None:
        """See `Teacher.of_other_text`."""


def open_cache(config: DistillConfig, vocab_size: int, groups: Groups, device: torch.device) -> CachedTeacher:
    """The cache of `teacher.cache`; UserError as of `require_cache`."""
    return CachedTeacher(require_cache(config, vocab_size), groups, device)


def require_cache(config: DistillConfig, vocab_size: int) -> CacheReader:
    """The cache of `teacher.cache`, before any of it is read.

    Raises:
        UserError: it is of other text, order, vocabulary, tokenizer or teacher, or has too few samples or tokens.
    """
    assert config.teacher_cache is not None
    reader = CacheReader(Path(config.teacher_cache))
    for name, cached, wanted, mend in _conditions(config, reader.facts, vocab_size):
        raise UserError(f"{config.teacher_cache}: {name} {cached}", f"{name} {wanted}, as in this run", mend)
    return reader


def _conditions(config: DistillConfig, facts: CacheFacts, vocab_size: int) -> Iterator[tuple[str, Any, Any, str]]:
    """(what, in the cache, in the run, what to do) of everything that does not fit."""
    again = "write the cache with the data and seed of this run"
    wanted, needed = identity(config.data, config.train.seed), config.steps() * config.batch.global_
    for name in ("sequence_length", "epochs", "seed", "order"):
        if facts.data.get(name) != wanted.get(name):
            yield name, facts.data.get(name), wanted.get(name), again
    if facts.data["sources"] != wanted["sources"]:
        yield "text", _short(facts.data["sources"]), _short(wanted["sources"]), again
    if facts.vocab_size != vocab_size:
        yield "vocabulary", facts.vocab_size, vocab_size, "use a cache of a teacher with the student's vocabulary"
    tokenizer = tokenizer_hash(hub.located(config.student))
    if None not in (tokenizer, facts.tokenizer) and tokenizer != facts.tokenizer:
        yield "tokenizer", facts.tokenizer, tokenizer, "use a cache of a teacher with the student's tokenizer"
    if facts.samples < needed:
        yield "samples", facts.samples, f"{needed} or more", "write a longer cache, or train fewer steps"
    k = config.resolved_loss().tokens_of_cache()
    assert k is not None, "the config refuses other losses"
    if facts.k < k:
        yield "k", facts.k, f"{k} or more", f"set loss.k to {facts.k} or less, or write the cache with a larger k"
    model = config.teacher.path if config.teacher is not None else None
    if model is not None and CheckpointIndex.open(model).fingerprint() != facts.teacher:
        yield "teacher", facts.teacher, f"that of {model}", "set teacher.path to null, or write the cache with this teacher"


def _short(sources: list[dict[str, Any]]) -> str:
    return ", ".join(f"{source['fingerprint'][:12]} x {source['weight']:.4g}" for source in sources)
