"""Perplexity, KL to the teacher and top-1 agreement of many models that share an output matrix, a block of tokens at a time: the
teacher's probabilities of a block are computed once for all. The numbers are those of `moe2dense eval`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.evals.perplexity import Measured
from megatron_moe2dense.surgery.dense_stream import Head

# Elements of a float32 block of logits [T, V]: on the CPU 4 MiB, which stay in the cache; elsewhere 512 MiB. At least so many tokens.
_BLOCK_ELEMENTS = {"cpu": 2**20}
_TOKENS = 64


@dataclass
class _Sums:
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


@dataclass(frozen=True)
class _TeacherBlock:
    """probs_TV; entropy_T in nats; top_T: the most probable token."""

    probs_TV: torch.Tensor
    entropy_T: torch.Tensor
    top_T: torch.Tensor


@torch.inference_mode()
def against_teacher(
    head: Head, windows_NS: np.ndarray, teacher_NSD: torch.Tensor, models: Sequence[torch.Tensor]
) -> tuple[Measured, list[Measured]]:
    """The teacher's and the models' sums over all predicted positions, S - 1 a window.

    Args:
        windows_NS: the tokens. teacher_NSD, models: hidden states after the last layer, [N, S, D] each.

    Raises:
        UserError: NaN or infinite logits, or sums.
    """
    tokens_P = torch.from_numpy(windows_NS).reshape(-1)
    # Row p predicts token p + 1; the last token of a window predicts nothing we know.
    rows_R = torch.arange(len(tokens_P)).view(windows_NS.shape)[:, :-1].reshape(-1)
    vocabulary = len(head.weight_VD)
    block = max(_TOKENS, _BLOCK_ELEMENTS.get(head.device.type, 2**27) // vocabulary)
    teacher_sums, sums = _Sums(), [_Sums() for _ in models]
    blocks = rows_R.split(block)
    for rows_T in progress(blocks, "compare with the teacher", "block", len(blocks)):
        targets_T = tokens_P[rows_T + 1].to(head.device)
        teacher = _teacher_block(_logits(head, teacher_NSD, rows_T, "teacher"), targets_T, teacher_sums)
        for number, (states_NSD, own) in enumerate(zip(models, sums, strict=True)):
            _add(_logits(head, states_NSD, rows_T, f"model {number}"), targets_T, teacher, own)
    for own in (teacher_sums, *sums):
        if not math.isfinite(own.nll) or not math.isfinite(own.kl):
            raise UserError(f"nll {own.nll}, KL {own.kl}", "finite sums", "a needed token has probability 0: check the weights")
    positions = len(rows_R)
    return (
        Measured(positions, teacher_sums.nll, 0.0, positions),
        [Measured(positions, own.nll, own.kl, own.agreed) for own in sums],
    )


def _logits(head: Head, states_NSD: torch.Tensor, rows_T: torch.Tensor, who: str) -> torch.Tensor:
    logits_TV = head.logits(states_NSD.flatten(0, 1)[rows_T].to(head.device))
    # The largest is NaN when any is, +inf when any is: one pass without temporaries.
    if not torch.isfinite(logits_TV.amax()):
        raise UserError(f"{who}: NaN or infinite logits", "finite logits", "check the weights, or use dtype=float32 (float16 overflows)")
    return logits_TV


def _teacher_block(logits_TV: torch.Tensor, targets_T: torch.Tensor, sums: _Sums) -> _TeacherBlock:
    log_probs_TV = torch.log_softmax(logits_TV, dim=-1)
    sums.nll -= log_probs_TV.gather(1, targets_T[:, None]).double().sum().item()
    probs_TV = log_probs_TV.exp()
    entropy_T = -(probs_TV * log_probs_TV).sum(1).double()
    return _TeacherBlock(probs_TV, entropy_T, log_probs_TV.argmax(1))


def _add(logits_TV: torch.Tensor, targets_T: torch.Tensor, teacher: _TeacherBlock, sums: _Sums) -> None:
    """KL = sum_v p_v (log p_v - s_v) + lse(s): no log-probabilities of the model are needed, only three reductions of its logits."""
    lse_T = torch.logsumexp(logits_TV, dim=-1).double()
    sums.nll += (lse_T - logits_TV.gather(1, targets_T[:, None])[:, 0].double()).sum().item()
    expected_T = torch.linalg.vecdot(teacher.probs_TV, logits_TV).double()
    sums.kl += (lse_T - expected_T - teacher.entropy_T).sum().item()
    sums.agreed += int((logits_TV.argmax(1) == teacher.top_T).sum())
