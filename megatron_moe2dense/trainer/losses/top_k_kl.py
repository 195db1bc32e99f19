"""Forward KL over the teacher's k most likely tokens and the mass of all others as one more outcome, for ablations and teacher caches."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe2dense.common.config import key
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import Dims
from megatron_moe2dense.trainer.losses import LogitLoss, losses
from megatron_moe2dense.trainer.losses.chunked import Chunk
from megatron_moe2dense.trainer.losses.targets import TopKTarget, local
from megatron_moe2dense.trainer.losses.vocab_parallel import log_partition, total


@losses.register("top_k_kl")
class TopKKl(LogitLoss):
    """sum over the top k of p_T log(p_T / p_S), plus R_T log(R_T / R_S) with R the rest of each distribution; never renormalised.

    The gradient is p_S - p_T inside the top k and p_S (1 - R_T / R_S) outside.
    """

    k: int = key(..., "tokens of the teacher that are compared one by one", "tokens", gt=0)

    def tokens_of_cache(self) -> int | None:
        """k: it takes a teacher cache, of as many tokens or more."""
        return self.k

    def require_models(self, student: Dims, teacher: Dims | None) -> None:  # noqa: ARG002
        """See `Loss.require_models`: of as many tokens as are compared."""
        if self.k > student.vocab_size:
            raise UserError(f"loss.k={self.k}", f"at most the vocabulary of {student.vocab_size}", "choose a smaller k")

    def of_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Nats per token and their gradient."""
        teacher = self._target(chunk)
        tokens_N, columns_N, places_N = here = local(teacher.indices_TK, chunk.start, chunk.student_TV.shape[-1])
        inside = here[:2]
        log_t_N = teacher.log_p_TK[tokens_N, places_N]
        p_t_N = log_t_N.exp()
        log_s_TV = chunk.student_TV.sub_(log_partition(chunk.student_TV, chunk.group)[:, None])
        inside_T = torch.zeros_like(teacher.tail_T).index_add_(0, tokens_N, p_t_N * (log_t_N - log_s_TV[inside]))
        p_s_TV = log_s_TV.exp_()
        p_s_N = p_s_TV[inside]
        p_s_TV[inside] = 0.0
        inside_T, rest_s_T = total(torch.stack([inside_T, p_s_TV.sum(-1)]), chunk.group)
        smallest = torch.finfo(torch.float32).tiny
        ratio_T = teacher.tail_T / rest_s_T.clamp_min(smallest)
        loss_T = inside_T + torch.xlogy(teacher.tail_T, ratio_T.clamp_min(smallest))
        grad_TV = p_s_TV.mul_((1.0 - ratio_T)[:, None])
        grad_TV[tokens_N, columns_N] = p_s_N - p_t_N
        return loss_T, grad_TV

    def _target(self, chunk: Chunk) -> TopKTarget:
        if chunk.top is not None:
            return chunk.top.best(self.k)
        assert chunk.teacher_TV is not None
        return TopKTarget.of_logits(chunk.teacher_TV, self.k, chunk.start, chunk.group)
