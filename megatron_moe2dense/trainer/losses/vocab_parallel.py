"""What a tensor-parallel rank knows of the logits: hidden states, its rows of the LM head, and sums over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabParallelLogits:
    """Logits that are never held as a whole: `hidden_TD @ weight_VD.T`, of which `valid` columns are vocabulary.

    Attributes:
        hidden_TD: final hidden states of T tokens, the same on all ranks of the group.
        weight_VD: this rank's rows of the LM head, padding rows included.
        start: vocabulary number of the first row. valid: rows that are no padding, 0 on a rank that holds padding only.
        group: the tensor-parallel process group, None for a single process.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    start: int
    valid: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, hidden_TD: Tensor, weight_VD: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> VocabParallelLogits:
        """This rank's shard: the vocabulary, padded, in equal parts over the ranks."""
        rank, rows = (dist.get_rank(group) if group is not None else 0), weight_VD.shape[0]
        start = rank * rows
        return cls(hidden_TD, weight_VD, start, max(0, min(rows, vocab_size - start)), group)

    def logits(self, tokens: slice) -> Tensor:
        """Logits of some tokens over the real columns, [tokens, valid]; computed in the weights' type, given as `wide`."""
        return wide(self.hidden_TD[tokens] @ self.weight_VD[: self.valid].t())


def wide(values: Tensor) -> Tensor:
    """As float32, in which losses are computed; float64 stays what it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def gather(stats_NT: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """One all-gather of N float32 numbers per token: [N, T] to [ranks, N, T]."""
    if group is None or dist.get_world_size(group) == 1:
        return stats_NT[None]
    out = stats_NT.new_empty((dist.get_world_size(group), *stats_NT.shape))
    dist.all_gather_into_tensor(out.view(-1, stats_NT.shape[-1]), stats_NT.contiguous(), group=group)
    return out


def shifted_exp(logits_TV: Tensor, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """max_T and exp(logits - max), in place on request. A shard without columns has max -inf, so it adds nothing to any sum."""
    if logits_TV.shape[-1] == 0:
        return logits_TV.new_full(logits_TV.shape[:1], -torch.inf), logits_TV
    max_T = logits_TV.amax(-1)
    shifted_TV = logits_TV.sub_(max_T[:, None]) if overwrite else logits_TV - max_T[:, None]
    return max_T, shifted_TV.exp_()


def scaled(values: Tensor, factor: float) -> Tensor:
    """values * factor, in place; a factor of 1 costs nothing."""
    return values if factor == 1.0 else values.mul_(factor)


def combine(max_RT: Tensor, sums_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Shifted sums of R ranks, each relative to its own maximum, to (overall max_T, sum_T relative to it)."""
    max_T = max_RT.amax(0)
    return max_T, (sums_RT * torch.exp(max_RT - max_T)).sum(0)


def log_partition(logits_TV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log-sum-exp over the whole vocabulary, [T]; two numbers per token are exchanged."""
    max_T, exp_TV = shifted_exp(logits_TV)
    gathered = gather(torch.stack([max_T, exp_TV.sum(-1)]), group)
    top_T, sum_T = combine(gathered[:, 0], gathered[:, 1])
    return top_T + sum_T.log()


def total(values_NT: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Plain sums over the ranks, [N, T]."""
    return gather(values_NT, group).sum(0)
