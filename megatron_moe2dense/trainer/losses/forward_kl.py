"""Forward KL(teacher || student) per token (paper Eq 5), vocabulary-parallel: one collective forward, none backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe2dense.common.config import key
from megatron_moe2dense.trainer.losses import Loss, losses
from megatron_moe2dense.trainer.losses.shards import VocabShard, combine, gather, shifted_exp


class _ForwardKl(torch.autograd.Function):
    """KL = sum_v p_T (t - s) - LSE_T + LSE_S with t, s = logits / temperature; times temperature squared.

    Each rank gathers five float32 numbers per token. The gradient (p_S - p_T) * temperature is formed in the forward pass and
    is the only [T, V] tensor kept.
    """

    @staticmethod
    def forward(ctx: Any, student_TV: Tensor, teacher_TV: Tensor, shards: tuple[VocabShard, float]) -> Tensor:
        shard, temperature = shards
        s_TV = student_TV[:, : shard.valid].float() / temperature
        t_TV = teacher_TV.float() / temperature
        max_t_T, exp_t_TV = shifted_exp(t_TV)
        max_s_T, exp_s_TV = shifted_exp(s_TV)
        dot_T = (exp_t_TV * (t_TV - s_TV)).sum(-1)
        gathered = gather(torch.stack([max_t_T, exp_t_TV.sum(-1), dot_T, max_s_T, exp_s_TV.sum(-1)]), shard.group)
        top_t_T, sum_t_T = combine(gathered[:, 0], gathered[:, 1])
        _, total_dot_T = combine(gathered[:, 0], gathered[:, 2])
        top_s_T, sum_s_T = combine(gathered[:, 3], gathered[:, 4])
        p_t_TV = exp_t_TV.mul_((torch.exp(max_t_T - top_t_T) / sum_t_T)[:, None])
        p_s_TV = exp_s_TV.mul_((torch.exp(max_s_T - top_s_T) / sum_s_T)[:, None])
        ctx.save_for_backward(p_s_TV.sub_(p_t_TV).mul_(temperature))
        ctx.columns, ctx.dtype = student_TV.shape[-1], student_TV.dtype
        kl_T = total_dot_T / sum_t_T - (top_t_T + sum_t_T.log()) + (top_s_T + sum_s_T.log())
        return kl_T * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (difference_TV,) = ctx.saved_tensors
        grad_TV = (difference_TV * grads[0][:, None]).to(ctx.dtype)
        return torch.nn.functional.pad(grad_TV, (0, ctx.columns - grad_TV.shape[-1])), None, None


@losses.register("forward_kl")
class ForwardKl(Loss):
    """KL(teacher || student), mean over unmasked tokens, times temperature squared (Hinton's gradient scale)."""

    temperature: float = key(1.0, "softmax temperature of both distributions", gt=0)

    def is_plain_kl(self) -> bool:
        """True at temperature 1."""
        return self.temperature == 1.0

    def per_token(self, student: VocabShard, teacher: VocabShard | None, labels_T: Tensor) -> Tensor:  # noqa: ARG002
        """KL in nats times temperature squared, [T]."""
        assert teacher is not None
        assert (student.start, student.valid) == (teacher.start, teacher.valid), "teacher and student shard the vocabulary differently"
        return _ForwardKl.apply(student.logits_TV, teacher.real(), (student, self.temperature))  # type: ignore[return-value]
