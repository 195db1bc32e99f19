"""Runs the teacher over the samples of shards and writes its top k: whole shards to the data-parallel ranks in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe2dense.common.progress import Progress
from megatron_moe2dense.trainer.cache.files import CacheFacts, write_shard
from megatron_moe2dense.trainer.data.samples import Samples
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses import chunked
from megatron_moe2dense.trainer.losses.targets import TopKTarget
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits
from megatron_moe2dense.trainer.runtime import context
from megatron_moe2dense.trainer.step import on_this_rank
from megatron_moe2dense.trainer.teacher import LiveTeacher

# Micro-batches in one pass of the pipeline, for each of its stages: more would fill the bubble better and keep more hidden states.
_ROUNDS = 4


@dataclass(frozen=True)
class Filler:
    """This rank's part of writing a cache.

    Attributes:
        facts: of the cache. directory: where its shards go. groups, teacher: of this rank. samples: of the stream, by number.
        micro: samples in a micro-batch. device: where batches go.
    """

    facts: CacheFacts
    directory: Path
    groups: Groups
    teacher: LiveTeacher
    samples: Samples
    micro: int
    device: torch.device

    @torch.no_grad()
    def fill(self, missing: Sequence[int]) -> None:
        """Write these shards; on every rank alike, each data-parallel rank one of them at a time."""
        ranks = self.groups.data_size
        with Progress("cache", "sample", sum(len(self.facts.shard(number)) for number in missing)) as shown:
            for first in range(0, len(missing), ranks):
                numbers = missing[first : first + ranks]
                longest = max(len(self.facts.shard(number)) for number in numbers)
                # Expert parallelism spans data-parallel ranks: one without a shard of its own computes another's and drops it.
                mine = numbers[min(self.groups.data_rank, len(numbers) - 1)]
                targets = self._targets(self.facts.shard(mine), longest)
                if targets and self.groups.data_rank < len(numbers):
                    write_shard(self.directory, mine, targets, self.facts.store)
                done = sum(len(self.facts.shard(number)) for number in numbers)
                shown.update(done, done * self.facts.data["sequence_length"])

    def _targets(self, shard: range, longest: int) -> list[TopKTarget]:
        """One target a sample of the shard, on the rank that writes them; an empty list elsewhere. Micro-batches for `longest` samples."""
        padded = [shard[min(i, len(shard) - 1)] for i in range(-(-longest // self.micro) * self.micro)]
        batches = [self.samples.batch(padded[i : i + self.micro], self.device) for i in range(0, len(padded), self.micro)]
        at_once = _ROUNDS * self.groups.parallel.pipeline
        found: list[TopKTarget] = []
        for first in range(0, len(batches), at_once):
            local = [on_this_rank(batch, self.groups) for batch in batches[first : first + at_once]]
            for hidden_SBD in self.teacher.targets(local):
                found += self._samples_of(top_k(self.teacher.output(hidden_SBD), self.facts.k))
        writes = self.groups.tensor_rank == 0 and self.groups.collection.cp.rank() == 0
        return found[: len(shard)] if writes else []

    def _samples_of(self, target: TopKTarget) -> list[TopKTarget]:
        """From T = S * B tokens, sequence-major, to B whole samples, on the CPU."""
        parts = [part.unflatten(0, (-1, self.micro)) for part in (target.indices_TK, target.log_p_TK, target.tail_T)]
        parts = [self._whole(part).cpu() for part in parts]
        return [TopKTarget(*(part[:, i] for part in parts)) for i in range(self.micro)]

    def _whole(self, part_SX: Tensor) -> Tensor:
        """All positions in order, from those of this rank."""
        if self.groups.parallel.context == 1:
            return part_SX
        group = self.groups.collection.cp
        _, order_S = context.positions(len(part_SX), group, part_SX.device)
        whole_SX = part_SX.new_empty((len(order_S), *part_SX.shape[1:]))
        whole_SX[order_S] = context.gather_sequence(part_SX.contiguous(), group)
        return whole_SX


def top_k(teacher: VocabParallelLogits, k: int) -> TopKTarget:
    """The k best of all tokens of a micro-batch, a chunk of tokens at a time."""
    slices = chunked.token_slices(len(teacher.hidden_TD), max(teacher.valid, 1))
    found = [TopKTarget.of_logits(teacher.logits(tokens), k, teacher.start, teacher.group) for tokens in slices]
    return TopKTarget(*(torch.cat(parts) for parts in zip(*((t.indices_TK, t.log_p_TK, t.tail_T) for t in found), strict=True)))
