"""Reverse KL(student || teacher) per token, for ablations (the paper found it clearly worse than forward KL)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe2dense.common.config import key
from megatron_moe2dense.trainer.losses import LogitLoss, losses
from megatron_moe2dense.trainer.losses.chunked import Chunk
from megatron_moe2dense.trainer.losses.vocab_parallel import combine, gather, scaled, shifted_exp


@losses.register("reverse_kl")
class ReverseKl(LogitLoss):
    """KL(student || teacher) times temperature squared: sum_v p_S (log p_S - log p_T); gradient p_S (log p_S/p_T - KL)."""

    temperature: float = key(1.0, "softmax temperature of both distributions", gt=0)

    def of_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """KL in nats times temperature squared, and its gradient."""
        assert chunk.teacher_TV is not None
        s_TV, t_TV = scaled(chunk.student_TV, 1 / self.temperature), scaled(chunk.teacher_TV, 1 / self.temperature)
        max_s_T, exp_s_TV = shifted_exp(s_TV)
        difference_TV = s_TV.sub_(t_TV)
        max_t_T, exp_t_TV = shifted_exp(t_TV, overwrite=True)
        dot_T = (exp_s_TV * difference_TV).sum(-1)
        gathered = gather(torch.stack([max_s_T, exp_s_TV.sum(-1), dot_T, max_t_T, exp_t_TV.sum(-1)]), chunk.group)
        top_s_T, sum_s_T = combine(gathered[:, 0], gathered[:, 1])
        _, total_dot_T = combine(gathered[:, 0], gathered[:, 2])
        top_t_T, sum_t_T = combine(gathered[:, 3], gathered[:, 4])
        shift_T = (top_t_T + sum_t_T.log()) - (top_s_T + sum_s_T.log())
        kl_T = total_dot_T / sum_s_T + shift_T
        p_s_TV = exp_s_TV.mul_((torch.exp(max_s_T - top_s_T) / sum_s_T)[:, None])
        grad_TV = difference_TV.add_((shift_T - kl_T)[:, None]).mul_(p_s_TV)
        return kl_T * self.temperature**2, scaled(grad_TV, self.temperature)
