"""Next-token cross-entropy, vocabulary-parallel, through Megatron-Core's own function."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe2dense.trainer.losses import Loss, losses
from megatron_moe2dense.trainer.losses.shards import VocabShard


@losses.register("cross_entropy")
class CrossEntropy(Loss):
    """Plain language modelling: -log p(next token)."""

    needs_teacher: ClassVar[bool] = False

    def per_token(self, student: VocabShard, teacher: VocabShard | None, labels_T: Tensor) -> Tensor:  # noqa: ARG002
        """Nats per token, [T]. Padding columns are pushed to the lowest float32, so they take no probability."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # here, because configs import this file

        logits_TV = student.logits_TV.to(torch.float32, copy=True)  # Megatron's function works in place
        if student.valid < logits_TV.shape[-1]:
            padding = torch.arange(logits_TV.shape[-1], device=logits_TV.device) >= student.valid
            logits_TV = logits_TV.masked_fill(padding, torch.finfo(torch.float32).min)
        return vocab_parallel_cross_entropy(logits_TV[:, None], labels_T[:, None])[:, 0]
