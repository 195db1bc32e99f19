"""A tensor-parallel rank's columns of the logits, and the float32 sums over the whole vocabulary that losses need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Columns `start .. start + valid` of the vocabulary; further columns of `logits_TV` are padding and never count.

    Attributes:
        logits_TV: [T, local columns], any float type.
        start: vocabulary number of the first column. valid: real columns, 0 on a rank that holds padding only.
        group: the tensor-parallel process group, None for a single process.
    """

    logits_TV: Tensor
    start: int
    valid: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, logits_TV: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """This rank's shard: equal columns on all ranks, padded to `vocab_size` rounded up."""
        rank = dist.get_rank(group) if group is not None else 0
        columns = logits_TV.shape[-1]
        start = rank * columns
        return cls(logits_TV, start, max(0, min(columns, vocab_size - start)), group)

    def real(self) -> Tensor:
        """Only the columns that are vocabulary, [T, valid]."""
        return self.logits_TV[:, : self.valid]


def gather(stats_NT: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """One all-gather of N float32 numbers per token: [N, T] to [ranks, N, T]."""
    if group is None or dist.get_world_size(group) == 1:
        return stats_NT[None]
    out = stats_NT.new_empty((dist.get_world_size(group), *stats_NT.shape))
    dist.all_gather_into_tensor(out.view(-1, stats_NT.shape[-1]), stats_NT.contiguous(), group=group)
    return out


def shifted_exp(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """max_T and exp(logits - max), float32. A shard without columns has max -inf, so it adds nothing to any sum."""
    if logits_TV.shape[-1] == 0:
        return logits_TV.new_full(logits_TV.shape[:1], -torch.inf), logits_TV
    max_T = logits_TV.amax(-1)
    return max_T, torch.exp(logits_TV - max_T[:, None])


def combine(max_RT: Tensor, sums_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Shifted sums of R ranks, each relative to its own maximum, to (overall max_T, sum_T relative to it)."""
    max_T = max_RT.amax(0)
    return max_T, (sums_RT * torch.exp(max_RT - max_T)).sum(0)
