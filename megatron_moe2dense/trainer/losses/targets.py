"""The teacher's k most likely next tokens and the mass of all others: made from its logits, or read from a teacher cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits, gather, log_partition, total


@dataclass(frozen=True)
class TopKTarget:
    """What is known of the teacher's distribution, for T tokens; the same on all ranks of a tensor-parallel group.

    Attributes:
        indices_TK: vocabulary numbers, int64, most likely first; -1 where the vocabulary has fewer than k tokens.
        log_p_TK: their log-probabilities, float32. tail_T: probability of all other tokens together.
    """

    indices_TK: Tensor
    log_p_TK: Tensor
    tail_T: Tensor

    @classmethod
    def of_logits(cls, logits_TV: Tensor, k: int, start: int, group: dist.ProcessGroup | None) -> TopKTarget:
        """From this rank's columns of the logits (vocabulary numbers from `start` on).

        Each rank's k best are gathered and the k best of these taken. Of tokens that tie with the k-th, some are outside.
        """
        lse_T = log_partition(logits_TV, group)
        values_TK, columns_TK = logits_TV.topk(min(k, logits_TV.shape[-1]), -1)
        missing = (0, k - values_TK.shape[-1])
        values_TK = torch.nn.functional.pad(values_TK, missing, value=-torch.inf)
        indices_TK = torch.nn.functional.pad(columns_TK + start, missing, value=-1)
        values_TR, indices_TR = (gather(part.t().contiguous(), group).flatten(0, 1).t() for part in (values_TK, indices_TK))
        best_TK, places_TK = values_TR.topk(k, -1)
        indices_TK = indices_TR.gather(-1, places_TK)
        p_TV = torch.exp(logits_TV - lse_T[:, None])
        p_TV[local(indices_TK, start, logits_TV.shape[-1])[:2]] = 0.0
        # Summed over the tokens outside: 1 - (the mass inside) would have no digits left where the teacher is sure.
        return cls(indices_TK, best_TK - lse_T[:, None], total(p_TV.sum(-1)[None], group)[0])

    def at(self, tokens: slice) -> TopKTarget:
        """Of some tokens."""
        return TopKTarget(self.indices_TK[tokens], self.log_p_TK[tokens], self.tail_T[tokens])

    def best(self, k: int) -> TopKTarget:
        """Of the k best alone, the others added to the tail: what `of_logits` would have given for this k."""
        assert k <= self.indices_TK.shape[-1], "a cache with fewer tokens is refused before training"
        return TopKTarget(self.indices_TK[:, :k], self.log_p_TK[:, :k], self.tail_T + self.log_p_TK[:, k:].exp().sum(-1))

    def normalised(self) -> TopKTarget:
        """Scaled to add up to 1 again, after log-probabilities were stored in few bits."""
        total_T = self.log_p_TK.exp().sum(-1) + self.tail_T
        return TopKTarget(self.indices_TK, self.log_p_TK - total_T.log()[:, None], self.tail_T / total_T)


# What a loss may be given of the teacher.
TeacherOutput = VocabParallelLogits | TopKTarget


def local(indices_TK: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token, column, place in K) of those indices that lie on this rank, N each."""
    columns_TK = indices_TK - start
    tokens_N, places_N = ((columns_TK >= 0) & (columns_TK < columns) & (indices_TK >= 0)).nonzero(as_tuple=True)
    return tokens_N, columns_TK[tokens_N, places_N], places_N
