"""Training losses by name, one file each: from what a rank knows of student and teacher to nats per token. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from megatron_moe2dense.common.registry import Method, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe2dense.families import Dims
    from megatron_moe2dense.trainer.losses.chunked import Chunk
    from megatron_moe2dense.trainer.losses.targets import TeacherOutput
    from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits


class Loss(Method, ABC):
    """One loss."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's shard is used."""
        return True

    def tokens_of_cache(self) -> int | None:
        """How many tokens of a teacher cache it needs; 0 without a teacher, None when it takes a live teacher alone."""
        return None if self.needs_teacher else 0

    def trains_head(self) -> bool:
        """Whether the student's LM head gets a gradient."""
        return True

    def is_plain_kl(self) -> bool:
        """Whether the value is KL(teacher || student) in nats itself, so that it may be reported as `kl`."""
        return False

    def require_models(self, student: Dims, teacher: Dims | None) -> None:
        """UserError when models of these sizes can not be compared so. teacher: None without a live one."""

    def at(self, share: float) -> Loss:  # noqa: ARG002
        """What is trained once this share of the run's steps is done: itself, but for a mixture some of whose terms are over."""
        return self

    @abstractmethod
    def per_token(self, student: VocabParallelLogits, teacher: TeacherOutput | None, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """Nats per token, float32 [T], not yet masked, the same on all ranks of the tensor-parallel group.

        Args:
            student, teacher: final hidden states and this rank's rows of the heads; of a teacher cache its `TopKTarget`.
            labels_T: the next tokens, int64 (full-vocabulary numbers). mask_T: 1.0 where a token counts; the result may only be
                differentiated as a multiple of `(result * mask_T).sum()`.
        """


class LogitLoss(Loss):
    """A loss of the two next-token distributions, computed a chunk of tokens at a time (`chunked`)."""

    @abstractmethod
    def of_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(nats per token [T], gradient in the student's logits [T, V]) of one chunk."""

    def per_token(self, student: VocabParallelLogits, teacher: TeacherOutput | None, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """See `Loss.per_token`."""
        from megatron_moe2dense.trainer.losses import chunked  # configs import this file, and it has no torch

        return chunked.per_token(self, (student, teacher if self.needs_teacher else None), labels_T, mask_T)


losses: Registry[Loss] = Registry("loss", __name__)
