"""What is reported about a step besides its loss: entropies, agreement and KL of student and teacher, in one pass without gradients.

A chunk of tokens at a time, one collective of at most 11 numbers per token, vocabulary-parallel; no [T, V] tensor exists.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.trainer.losses import chunked
from megatron_moe2dense.trainer.losses.vocab_parallel import gather, shifted_exp

ALONE = ("cross_entropy", "student_entropy")
AGAINST_TEACHER = (*ALONE, "teacher_cross_entropy", "teacher_entropy", "kl", "top1_agreement")


class LogitShard(Protocol):
    """A rank's columns of the logits of some tokens; `VocabParallelLogits` is one."""

    @property
    def start(self) -> int:
        """Vocabulary number of the first column."""
        ...

    @property
    def valid(self) -> int:
        """Columns of this rank that are vocabulary."""
        ...

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that the vocabulary is split over."""
        ...

    def logits(self, tokens: slice) -> Tensor:
        """float32 [tokens, valid]."""
        ...


@torch.no_grad()
def per_token(student: LogitShard, teacher: LogitShard | None, labels_T: Tensor) -> Tensor:
    """float32 [N, T], the same on all ranks of the group; N = AGAINST_TEACHER, or ALONE without a teacher.

    cross_entropy is -log p(next token), entropies are -sum p log p, kl KL(teacher || student), all in nats at temperature 1; top1_agreement
    is 1 where both have the same most likely token (the first of those that tie).
    """
    names = ALONE if teacher is None else AGAINST_TEACHER
    if teacher is not None:
        assert (student.start, student.valid) == (teacher.start, teacher.valid), "teacher and student shard the vocabulary differently"
    values_NT = torch.empty((len(names), len(labels_T)), dtype=torch.float32, device=labels_T.device)
    for tokens in chunked.token_slices(len(labels_T), max(student.valid, 1)):
        s_TV, columns_T = student.logits(tokens), labels_T[tokens] - student.start
        if teacher is None:
            values_NT[:, tokens] = torch.stack(_alone(gather(_sums(s_TV, columns_T, student.start), student.group))[:2])
        else:
            values_NT[:, tokens] = _against(s_TV, teacher.logits(tokens), columns_T, student)
    return values_NT


def masked_sums(student: LogitShard, teacher: LogitShard | None, labels_T: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over the unmasked tokens of each of AGAINST_TEACHER, float64; NaN for what takes a teacher when there is none."""
    sums_N = per_token(student, teacher, labels_T).double() @ mask_T.double()
    return torch.nn.functional.pad(sums_N, (0, len(AGAINST_TEACHER) - len(sums_N)), value=torch.nan)


def _sums(logits_TV: Tensor, columns_T: Tensor, start: int) -> Tensor:
    """What one rank says of one distribution, [5, T]: max m, sum e^(x-m), sum e^(x-m)(x-m), top token, the label's logit or -inf."""
    max_T, exp_TV = shifted_exp(logits_TV)
    label_T = torch.full_like(max_T, -torch.inf)
    if logits_TV.shape[-1] == 0:  # a shard of padding only
        nothing_T = torch.zeros_like(max_T)
        return torch.stack([max_T, nothing_T, nothing_T, nothing_T, label_T])
    mine_T = (columns_T >= 0) & (columns_T < logits_TV.shape[-1])
    picked_T = logits_TV.gather(-1, columns_T.clamp(0, logits_TV.shape[-1] - 1)[:, None])[:, 0]
    # token numbers are exact in float32 up to 16.7 million
    top_T = (logits_TV.argmax(-1) + start).float()
    moment_T = (exp_TV * (logits_TV - max_T[:, None])).sum(-1)
    return torch.stack([max_T, exp_TV.sum(-1), moment_T, top_T, torch.where(mine_T, picked_T, label_T)])


def _alone(sums_RNT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(cross-entropy, entropy, top token, maximum, sum relative to it), [T] each, from the `_sums` of R ranks."""
    max_RT, sum_RT, moment_RT, top_RT, label_RT = sums_RNT.unbind(1)
    max_T, best_T = max_RT.max(0)
    shift_RT = torch.where(max_RT.isinf(), 0.0, max_RT - max_T)
    weight_RT = torch.where(max_RT.isinf(), 0.0, shift_RT.exp())
    sum_T = (weight_RT * sum_RT).sum(0)
    moment_T = (weight_RT * (moment_RT + sum_RT * shift_RT)).sum(0)
    log_sum_T = sum_T.log()
    cross_entropy_T = log_sum_T - (label_RT.amax(0) - max_T)
    return cross_entropy_T, log_sum_T - moment_T / sum_T, top_RT.gather(0, best_T[None])[0], max_T, sum_T


def _against(s_TV: Tensor, t_TV: Tensor, columns_T: Tensor, shard: LogitShard) -> Tensor:
    """[6, T] in the order of AGAINST_TEACHER."""
    s_NT, t_NT = _sums(s_TV, columns_T, shard.start), _sums(t_TV, columns_T, shard.start)
    # KL = sum_v p_T ((t - max_t) - (s - max_s)) - log sum_t + log sum_s, the maxima of the rank here and over all ranks below
    _, exp_t_TV = shifted_exp(t_TV)
    cross_T = (exp_t_TV * s_TV.sub_(s_NT[0, :, None])).sum(-1)
    gathered = gather(torch.cat([s_NT, t_NT, cross_T[None]]), shard.group)
    s_cross_T, s_entropy_T, s_top_T, s_max_T, s_sum_T = _alone(gathered[:, :5])
    t_cross_T, t_entropy_T, t_top_T, t_max_T, t_sum_T = _alone(gathered[:, 5:10])
    s_max_RT, t_max_RT, t_sum_RT = gathered[:, 0], gathered[:, 5], gathered[:, 6]
    empty_RT = t_max_RT.isinf()
    weight_RT = torch.where(empty_RT, 0.0, (t_max_RT - t_max_T).exp())
    shift_RT = torch.where(empty_RT, 0.0, s_max_RT - s_max_T)
    mean_s_T = (weight_RT * (gathered[:, 10] + t_sum_RT * shift_RT)).sum(0) / t_sum_T
    kl_T = s_sum_T.log() - mean_s_T - t_entropy_T
    agree_T = (s_top_T == t_top_T).float()
    return torch.stack([s_cross_T, s_entropy_T, t_cross_T, t_entropy_T, kl_T, agree_T])
