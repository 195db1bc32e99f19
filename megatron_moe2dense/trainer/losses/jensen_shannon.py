"""Jensen-Shannon divergence per token, for ablations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_moe2dense.common.config import key
from megatron_moe2dense.trainer.losses import LogitLoss, losses
from megatron_moe2dense.trainer.losses.chunked import Chunk
from megatron_moe2dense.trainer.losses.vocab_parallel import log_partition, scaled, total


@losses.register("jensen_shannon")
class JensenShannon(LogitLoss):
    """(KL(teacher || m) + KL(student || m)) / 2 with m their mean, times temperature squared; gradient p_S (log p_S/m - KL(S || m)) / 2."""

    temperature: float = key(1.0, "softmax temperature of both distributions", gt=0)

    def of_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Nats times temperature squared, and their gradient. A probability that underflows to 0 adds nothing."""
        assert chunk.teacher_TV is not None
        log_s_TV, log_t_TV = scaled(chunk.student_TV, 1 / self.temperature), scaled(chunk.teacher_TV, 1 / self.temperature)
        log_s_TV -= log_partition(log_s_TV, chunk.group)[:, None]
        log_t_TV -= log_partition(log_t_TV, chunk.group)[:, None]
        log_m_TV = torch.logaddexp(log_s_TV, log_t_TV) - math.log(2.0)
        p_s_TV, p_t_TV = log_s_TV.exp(), log_t_TV.exp()
        student_TV, teacher_TV = log_s_TV.sub_(log_m_TV), log_t_TV.sub_(log_m_TV)
        kl_s_T, kl_t_T = total(torch.stack([(p_s_TV * student_TV).sum(-1), (p_t_TV * teacher_TV).sum(-1)]), chunk.group)
        grad_TV = student_TV.sub_(kl_s_T[:, None]).mul_(p_s_TV).mul_(self.temperature / 2)
        return (kl_s_T + kl_t_T) / 2 * self.temperature**2, grad_TV
