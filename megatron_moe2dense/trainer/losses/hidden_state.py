"""Mean squared error between the final hidden states, for ablations (the paper found it clearly worse than forward KL)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import Dims
from megatron_moe2dense.trainer.losses import Loss, losses
from megatron_moe2dense.trainer.losses.targets import TeacherOutput
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits, wide


class _Shared(torch.autograd.Function):
    """Identity whose gradient is divided by the ranks that all compute the same loss: their gradients are summed later."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden_TD.view_as(hidden_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / ctx.ranks, None


@losses.register("hidden_state")
class HiddenState(Loss):
    """mean over the hidden size of (student - teacher)^2, after the final norm (ours; the paper's exact form is in no reachable text)."""

    def trains_head(self) -> bool:
        """See `Loss.trains_head`: never, hidden states come before it."""
        return False

    def require_models(self, student: Dims, teacher: Dims | None) -> None:
        """See `Loss.require_models`: of one hidden size."""
        if teacher is not None and student.hidden_size != teacher.hidden_size:
            raise UserError(
                f"hidden sizes {student.hidden_size} and {teacher.hidden_size}",
                "a student as wide as its teacher for the hidden_state loss",
                "use a loss on the logits, such as forward_kl",
            )

    def per_token(self, student: VocabParallelLogits, teacher: TeacherOutput | None, labels_T: Tensor, mask_T: Tensor) -> Tensor:  # noqa: ARG002
        """Squared units of the hidden states, [T]."""
        assert isinstance(teacher, VocabParallelLogits)
        assert student.hidden_TD.shape == teacher.hidden_TD.shape, "refused by require_models"
        ranks = dist.get_world_size(student.group) if student.group is not None else 1
        hidden_TD = _Shared.apply(student.hidden_TD, ranks)
        assert isinstance(hidden_TD, Tensor)
        return (wide(hidden_TD) - wide(teacher.hidden_TD)).square().mean(-1)
