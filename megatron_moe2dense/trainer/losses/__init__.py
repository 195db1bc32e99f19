"""Training losses by name, one file each: from vocabulary shards of student and teacher to nats per token. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from megatron_moe2dense.common.registry import Method, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe2dense.trainer.losses.shards import VocabShard


class Loss(Method, ABC):
    """One loss. `needs_teacher` says whether the teacher's shard is used."""

    needs_teacher: ClassVar[bool] = True

    def is_plain_kl(self) -> bool:
        """Whether the value is KL(teacher || student) in nats itself, so that it may be reported as `kl`."""
        return False

    @abstractmethod
    def per_token(self, student: VocabShard, teacher: VocabShard | None, labels_T: Tensor) -> Tensor:
        """Nats per token, float32 [T], the same on all ranks of the tensor-parallel group, differentiable in the student's logits.

        Args:
            student, teacher: this rank's columns of the logits.
            labels_T: the next tokens, int64 (full-vocabulary numbers).
        """


losses: Registry[Loss] = Registry("loss", __name__)
