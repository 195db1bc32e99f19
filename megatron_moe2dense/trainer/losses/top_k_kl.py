"""Forward KL over the teacher's k most likely tokens and the mass of all others as one more outcome, for ablations."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe2dense.common.config import key
from megatron_moe2dense.trainer.losses import LogitLoss, losses
from megatron_moe2dense.trainer.losses.chunked import Chunk
from megatron_moe2dense.trainer.losses.shards import gather, log_partition, total


@losses.register("top_k_kl")
class TopKKl(LogitLoss):
    """sum over the top k of p_T log(p_T / p_S), plus R_T log(R_T / R_S) with R the rest of each distribution; never renormalised.

    The gradient is p_S - p_T inside the top k and p_S (1 - R_T / R_S) outside. Tokens that tie with the k-th are all inside.
    """

    k: int = key(..., "tokens of the teacher that are compared one by one", "tokens", gt=0)

    def of_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Nats per token and their gradient."""
        assert chunk.teacher_TV is not None
        log_s_TV, log_t_TV = chunk.student_TV, chunk.teacher_TV
        inside_TV = log_t_TV >= self._threshold(log_t_TV, chunk)[:, None]
        log_s_TV -= log_partition(log_s_TV, chunk.group)[:, None]
        log_t_TV -= log_partition(log_t_TV, chunk.group)[:, None]
        p_s_TV, p_t_TV = log_s_TV.exp(), log_t_TV.exp()
        divergence_TV = log_t_TV.sub_(log_s_TV).mul_(p_t_TV)
        sums = [torch.where(inside_TV, divergence_TV, 0.0), *(p.masked_fill(inside_TV, 0.0) for p in (p_t_TV, p_s_TV))]
        inside_T, rest_t_T, rest_s_T = total(torch.stack([part.sum(-1) for part in sums]), chunk.group)
        smallest = torch.finfo(torch.float32).tiny
        ratio_T = rest_t_T / rest_s_T.clamp_min(smallest)
        loss_T = inside_T + torch.xlogy(rest_t_T, ratio_T.clamp_min(smallest))
        return loss_T, p_s_TV - torch.where(inside_TV, p_t_TV, p_s_TV * ratio_T[:, None])

    def _threshold(self, logits_TV: Tensor, chunk: Chunk) -> Tensor:
        """The teacher's k-th largest logit over the whole vocabulary, [T]."""
        mine_TK = logits_TV.topk(min(self.k, logits_TV.shape[-1]), -1).values
        padded_TK = torch.nn.functional.pad(mine_TK, (0, self.k - mine_TK.shape[-1]), value=-torch.inf)
        all_TK = gather(padded_TK.t().contiguous(), chunk.group).flatten(0, 1).t()
        return all_TK.topk(self.k, -1).values[:, -1]
