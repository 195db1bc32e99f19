"""Next-token cross-entropy, vocabulary-parallel: plain language modelling."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe2dense.trainer.losses import LogitLoss, losses
from megatron_moe2dense.trainer.losses.chunked import Chunk
from megatron_moe2dense.trainer.losses.vocab_parallel import log_partition, total


@losses.register("cross_entropy")
class CrossEntropy(LogitLoss):
    """-log p(next token); gradient p - 1[next token]."""

    @property
    def needs_teacher(self) -> bool:
        """It looks at labels alone."""
        return False

    def of_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Nats per token and their gradient."""
        lse_T = log_partition(chunk.student_TV, chunk.group)
        columns_T = chunk.labels_T - chunk.start
        mine_T = ((columns_T >= 0) & (columns_T < chunk.student_TV.shape[-1])).nonzero()[:, 0]
        here = (mine_T, columns_T[mine_T])
        label_logit_T = torch.zeros_like(lse_T)
        label_logit_T[mine_T] = chunk.student_TV[here]
        grad_TV = torch.exp(chunk.student_TV - lse_T[:, None])
        grad_TV[here] -= 1.0
        return lse_T - total(label_logit_T[None], chunk.group)[0], grad_TV
