"""Before step 0 the teacher is verified: its weights are those of the files, it predicts text, it computes what transformers computes.

A teacher that loaded wrong still trains a student, to the wrong distribution, with a loss that falls.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.machine import free_memory
from megatron_moe2dense.trainer.agreement import raise_on_all_ranks
from megatron_moe2dense.trainer.config import DistillConfig, TeacherCheckConfig
from megatron_moe2dense.trainer.data.samples import Batch
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses import measures
from megatron_moe2dense.trainer.step import on_this_rank
from megatron_moe2dense.trainer.teacher import LiveTeacher
from megatron_moe2dense.trainer.verification import fingerprint

# The stock forward sees the first so many tokens of the sample: attention is causal, so their logits do not depend on the rest.
_COMPARED = 128
# What KL(stock || ours) may reach over the tokens compared, mean and median [nats]. Two right implementations differ by rounding alone: on
# the pico MoE 7e-8 and 0 in float32, 1.5e-3 and 1.7e-4 in bfloat16, where the experts of a few tokens change and make most of the mean.
# The slightest fault tried, query and key norms swapped, gives 9e-3 and 3e-3 there, gate and up swapped 1.6 and 1.1.
_MOST_KL = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (3e-2, 2e-3)}
# Of a teacher whose weights were rounded to FP8 as they were loaded: there 2.6e-3 and 9e-4.
_MOST_KL_ROUNDED = (5e-2, 5e-3)


@dataclass(frozen=True)
class Numbers:
    """Nats per token on the first training sample; None for what was not measured.

    Attributes:
        loss: of the teacher's next-token predictions. stock_loss, loss_there: of transformers and of the teacher on the tokens compared.
        stock_kl, stock_kl_median: KL(transformers || teacher) there.
    """

    loss: float | None = None
    loss_there: float | None = None
    stock_loss: float | None = None
    stock_kl: float | None = None
    stock_kl_median: float | None = None


@dataclass(frozen=True)
class _StockShard:
    """This rank's columns of the stock logits; a `measures.LogitShard`."""

    logits_TV: Tensor
    start: int
    valid: int
    group: dist.ProcessGroup | None

    def logits(self, tokens: slice) -> Tensor:
        return self.logits_TV[tokens, self.start : self.start + self.valid].clone()


def verify_teacher(
    teacher: LiveTeacher, config: DistillConfig, groups: Groups, batch: Batch, recorded: dict[str, Any] | None
) -> dict[str, Any]:
    """Run the checks and return what the manifest keeps of them; a collective of all ranks.

    Args:
        batch: one sample, the same on all ranks. recorded: what an earlier part of this run kept; with the same fingerprint the forward
            passes are not repeated.

    Raises:
        UserError: weights that are not those of the files, or not those the run began with; a loss or a KL above its bound.
    """
    assert config.live_teacher is not None
    began, directory, check = time.monotonic(), hub.located(config.live_teacher), config.resolved_teacher_check()
    found = fingerprint.verify(teacher.chunks, teacher.spec, groups)
    if recorded is not None and recorded["fingerprint"] != found.digest:
        raise UserError(
            f"{directory}: weights with fingerprint {found.digest}, this run began with {recorded['fingerprint']}",
            "one teacher for the whole run",
            "put the first teacher back, or start a new run in another output",
        )
    if found.zeros:
        logger.warning("teacher: %d matrices are all zeros in the files, first %s", len(found.zeros), found.zeros[0])
    if recorded is not None and (recorded["stock_kl"] is not None or check.stock_forward != "always"):
        logger.info("teacher: fingerprint %s, as when the run began (%.1f s)", found.digest, time.monotonic() - began)
        return recorded
    numbers = _measure(teacher, check, (directory, groups, batch), config.active_experts())
    _judge(numbers, teacher, check, directory)
    logger.info("teacher: fingerprint %s, %s (%.1f s)", found.digest, _described(numbers, teacher), time.monotonic() - began)
    return {"fingerprint": found.digest, **vars(numbers)}


def _described(numbers: Numbers, teacher: LiveTeacher) -> str:
    uniform = f"(a uniform guess: {math.log(teacher.spec.dims.vocab_size):.4f})"
    text = f"loss {numbers.loss:.4f} {uniform} on the first sample"
    return f"{text}, {_comparison(numbers)}" if numbers.stock_kl is not None else f"{text}, not compared with stock transformers"


def _comparison(numbers: Numbers) -> str:
    kl = f"KL {numbers.stock_kl:.1e} nats/token, median {numbers.stock_kl_median:.1e}"
    return f"{kl}, to the stock transformers forward (losses there {numbers.loss_there:.4f}, transformers' {numbers.stock_loss:.4f})"


def _judge(numbers: Numbers, teacher: LiveTeacher, check: TeacherCheckConfig, directory: Path) -> None:
    uniform, rounded = math.log(teacher.spec.dims.vocab_size), teacher.lost.matrices > 0
    mean, median = _MOST_KL_ROUNDED if rounded else _MOST_KL[teacher.spec.dtype]
    found = (numbers.stock_kl, numbers.stock_kl_median)
    # written so that NaN does not pass
    if not all(value is None or value <= most for value, most in zip(found, (mean, median), strict=True)):
        raise UserError(
            f"teacher {directory}: {_comparison(numbers)}",
            f"at most {mean:g} and {median:g} in {'rounded FP8' if rounded else str(teacher.spec.dtype).removeprefix('torch.')}",
            "Megatron-Core computes another model than transformers: check the family's weight mapping and fields (docs/adding.md), "
            "or train without this comparison: teacher.check.stock_forward=never",
        )
    assert numbers.loss is not None
    if check.loss_bound is not None and not numbers.loss <= check.loss_bound * uniform:
        raise UserError(
            f"teacher {directory}: loss {numbers.loss:.4f} nats/token on the first sample, a uniform guess has {uniform:.4f}",
            f"at most {check.loss_bound:g} of that, as any trained model has on its kind of text",
            "check that the teacher is trained and the tokens are of its tokenizer; for a test set teacher.check.loss_bound=null",
        )


def _measure(teacher: LiveTeacher, check: TeacherCheckConfig, given: tuple[Path, Groups, Batch], active: int | None) -> Numbers:
    stock_SV = _stock_logits(teacher, check, given, active)
    batch = on_this_rank(given[2], given[1])
    compared = len(stock_SV) if stock_SV is not None else 0
    # by place in the sample, whose tokens context parallelism spreads over ranks: ours, theirs, KL, and how many ranks said so
    sums_4P = torch.zeros((4, compared), dtype=torch.float64, device=batch.tokens.device)
    loss_and_count = sums_4P.new_zeros(2)
    targets = teacher.targets([batch])
    if targets:  # the last stage; copies of a sample weigh the same, so they leave the means alone
        shard, (labels_T, mask_T) = teacher.output(targets[0]), batch.flat()
        loss_T = measures.per_token(shard, None, labels_T)[0]
        loss_and_count += torch.stack([(loss_T * mask_T).sum(), mask_T.sum()])
        if stock_SV is not None:
            places_T = batch.positions.t().reshape(-1)
            rows_N = (places_T < compared).nonzero()[:, 0]
            stock = _StockShard(stock_SV[places_T[rows_N]], shard.start, shard.valid, shard.group)
            ours = replace(shard, hidden_TD=shard.hidden_TD[rows_N])
            values = dict(zip(measures.AGAINST_TEACHER, measures.per_token(ours, stock, labels_T[rows_N]), strict=True))
            said = [values["cross_entropy"], values["teacher_cross_entropy"], values["kl"], torch.ones_like(values["kl"])]
            sums_4P[:, places_T[rows_N]] = torch.stack(said).double()
    dist.all_reduce(loss_and_count)
    dist.all_reduce(sums_4P)
    loss, tokens = loss_and_count.tolist()
    if stock_SV is None:
        return Numbers(loss / max(tokens, 1.0))
    means_3P = sums_4P[:3] / sums_4P[3]
    ours, theirs, kl = means_3P.mean(1).tolist()
    return Numbers(loss / max(tokens, 1.0), ours, theirs, kl, float(means_3P[2].median()))


def _stock_logits(teacher: LiveTeacher, check: TeacherCheckConfig, given: tuple[Path, Groups, Batch], active: int | None) -> Tensor | None:
    """Stock logits [S, V] of the first tokens on every rank, computed by one of them; None when it is not to be, or does not fit."""
    directory, groups, batch = given
    computes = groups.writes_metrics and not (groups.collection.cp.rank())
    device = batch.tokens.device
    source = torch.tensor(dist.get_rank() if computes else -1, device=device)
    dist.all_reduce(source, op=dist.ReduceOp.MAX)
    result_SV = None
    with raise_on_all_ranks():
        if computes and check.stock_forward != "never" and _fits(directory, teacher.spec.dtype, check):
            from megatron_moe2dense.trainer.verification import stock  # transformers takes seconds to import

            result_SV = stock.logits(directory, teacher.spec.dtype, batch.tokens[0, :_COMPARED], active).to(device)
    shape = torch.tensor(result_SV.shape if result_SV is not None else (0, 0), device=device)
    dist.broadcast(shape, int(source))
    if int(shape[0]) == 0:
        return None
    if result_SV is None:
        result_SV = torch.empty(shape.tolist(), device=device)
    dist.broadcast(result_SV, int(source))
    return result_SV


def _fits(directory: Path, dtype: torch.dtype, check: TeacherCheckConfig) -> bool:
    from megatron_moe2dense.trainer.verification import stock

    needed, free = stock.host_bytes(CheckpointIndex.open(directory), dtype), free_memory()
    if check.stock_forward == "auto" and free is not None and needed > free:
        logger.warning(
            "teacher: not compared with stock transformers, which takes %.1f GB of host memory, %.1f are free", needed / 1e9, free / 1e9
        )
        return False
    return True
