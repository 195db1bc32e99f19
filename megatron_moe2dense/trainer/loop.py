"""The training loop: step, log, evaluate, save; from step 0 or from where a checkpoint left off."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.trainer.checkpoint import Checkpointer
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data import SampleStream
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses import Loss, losses
from megatron_moe2dense.trainer.metrics import Metrics, peak_memory_bytes
from megatron_moe2dense.trainer.preemption import StopRequest
from megatron_moe2dense.trainer.step import Models, StepLoss, student_pass

# A run whose loss is not finite for so many steps in a row will not recover.
_MOST_SKIPPED_IN_A_ROW = 10


@dataclass
class TrainState:
    """Progress of a run; what a checkpoint restores besides weights and optimizer."""

    step: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Trainer:
    """Everything one rank needs to train."""

    config: DistillConfig
    groups: Groups
    models: Models
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    training: SampleStream
    validation: SampleStream | None
    checkpointer: Checkpointer
    metrics: Metrics

    def fit(self, state: TrainState) -> bool:
        """Train to the last step, or to the step at which a signal asks to stop; saved either way. True at the last step.

        Raises:
            UserError: the loss stays NaN or infinite.
        """
        stop = StopRequest()
        with stop.listening():
            return self._fit(state, stop)

    def _fit(self, state: TrainState, stop: StopRequest) -> bool:
        config, steps, skipped_in_a_row = self.config, self.config.steps(), 0
        loss = config.resolved_loss()
        bar = progress(None, "train", "step", total=steps, initial=state.step)
        while state.step < steps:
            started = time.perf_counter()
            result, grad_norm = self.step(state, loss)
            state.step += 1
            state.tokens += result.tokens
            skipped_in_a_row = skipped_in_a_row + 1 if grad_norm is None else 0
            self._log(state, result, grad_norm, time.perf_counter() - started)
            bar.update()
            if skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"loss {result.means[0]} for {skipped_in_a_row} steps in a row, the last is {state.step}",
                    "a finite loss",
                    "resume from an earlier checkpoint with a lower optim.lr, or look at the data of these steps",
                )
            if self.validation is not None and self._due(state.step, config.train.eval_every):
                self.evaluate(state)
            stopping = stop.agreed(self.training.device) and state.step < steps
            if stopping or self._due(state.step, config.train.save_every):
                self.checkpointer.save(self.models.student, self.optimizer, self.scheduler, vars(state))
            if stopping:
                logger.warning("asked to stop: saved step %d; the same command continues from there", state.step)
                return False
        bar.close()
        return True

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.config.steps() or (every is not None and step % every == 0)

    def step(self, state: TrainState, loss: Loss) -> tuple[StepLoss, float | None]:
        """One optimizer step. Returns the loss and the gradient norm, None when a non-finite loss made it skip the update."""
        size = self.config.batch.global_
        batches = self.training.micro_batches(state.step * size, size)
        for chunk in self.models.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        result = student_pass(self.models, [loss], batches, self.groups)
        self.scheduler.step(1)
        if not math.isfinite(result.means[0]):
            return result, None
        outcome: Any = self.optimizer.step()
        return result, float(outcome[1])

    def evaluate(self, state: TrainState) -> None:
        """Held-out next-token loss and, with a teacher, KL(teacher || student), written as an eval row."""
        assert self.validation is not None
        has_teacher = self.models.teacher is not None
        measured = [losses["cross_entropy"](), *([losses["forward_kl"]()] if has_teacher else [])]
        batches = self.validation.micro_batches(0, self.config.data.validation_sequences)
        for chunk in self.models.student:
            chunk.eval()
        result = student_pass(self.models, measured, batches, self.groups, forward_only=True)
        for chunk in self.models.student:
            chunk.train()
        kl = result.means[1] if has_teacher else None
        self.metrics.write({"step": state.step, "tokens": state.tokens, "eval_loss": result.means[0], "eval_kl": kl})
        logger.info("step %d: held-out loss %.4f%s", state.step, result.means[0], f", KL {kl:.4f}" if kl is not None else "")

    def _log(self, state: TrainState, result: StepLoss, grad_norm: float | None, seconds: float) -> None:
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        loss = self.config.resolved_loss()
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.means[0],
            "kl": result.means[0] if loss.is_plain_kl() else None,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(result.tokens / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped": grad_norm is None,
        }
        self.metrics.write(row)
        if state.step % self.config.train.log_every == 0 or state.step == self.config.steps() or grad_norm is None:
            norm = "skipped" if grad_norm is None else f"{grad_norm:.3f}"
            speed = f"{row['tokens_per_second']:.0f}"
            logger.info("step %d: loss %.4f, grad norm %s, lr %.2e, %s tokens/s", state.step, result.means[0], norm, lr, speed)
