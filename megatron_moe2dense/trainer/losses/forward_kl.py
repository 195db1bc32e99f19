"""Forward KL(teacher || student) per token (paper Eq 5), vocabulary-parallel: one collective of five numbers per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe2dense.common.config import key
from megatron_moe2dense.trainer.losses import LogitLoss, losses
from megatron_moe2dense.trainer.losses.chunked import Chunk
from megatron_moe2dense.trainer.losses.vocab_parallel import combine, gather, scaled, shifted_exp


@losses.register("forward_kl")
class ForwardKl(LogitLoss):
    """KL(teacher || student), mean over unmasked tokens, times temperature squared (Hinton's gradient scale).

    KL = sum_v p_T (t - s) - LSE_T + LSE_S with t, s = logits / temperature; its gradient in s is p_S - p_T.
    """

    temperature: float = key(1.0, "softmax temperature of both distributions", gt=0)

    def is_plain_kl(self) -> bool:
        """True at temperature 1."""
        return self.temperature == 1.0

    def of_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """KL in nats times temperature squared, and its gradient."""
        assert chunk.teacher_TV is not None
        s_TV, t_TV = scaled(chunk.student_TV, 1 / self.temperature), scaled(chunk.teacher_TV, 1 / self.temperature)
        max_t_T, exp_t_TV = shifted_exp(t_TV)
        dot_T = (t_TV.sub_(s_TV).mul_(exp_t_TV)).sum(-1)
        max_s_T, exp_s_TV = shifted_exp(s_TV, overwrite=True)
        gathered = gather(torch.stack([max_t_T, exp_t_TV.sum(-1), dot_T, max_s_T, exp_s_TV.sum(-1)]), chunk.group)
        top_t_T, sum_t_T = combine(gathered[:, 0], gathered[:, 1])
        _, total_dot_T = combine(gathered[:, 0], gathered[:, 2])
        top_s_T, sum_s_T = combine(gathered[:, 3], gathered[:, 4])
        p_s_TV = exp_s_TV.mul_((torch.exp(max_s_T - top_s_T) / sum_s_T)[:, None])
        grad_TV = p_s_TV.addcmul_(exp_t_TV, (torch.exp(max_t_T - top_t_T) / sum_t_T)[:, None], value=-1.0)
        kl_T = total_dot_T / sum_t_T - (top_t_T + sum_t_T.log()) + (top_s_T + sum_s_T.log())
        return kl_T * self.temperature**2, scaled(grad_TV, self.temperature)
