"""The training loop: step, log, evaluate, save; from step 0 or from where a checkpoint left off."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, replace

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.progress import StepLines
from megatron_moe2dense.trainer import balancing
from megatron_moe2dense.trainer.checkpoints.checkpointer import Checkpointer
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.samples import SampleStream
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.metrics import Metrics, Speed, StepFacts, eval_row, peak_memory_bytes, step_row
from megatron_moe2dense.trainer.optim import gradients, release, update
from megatron_moe2dense.trainer.preemption import StopRequest
from megatron_moe2dense.trainer.runtime import collectives
from megatron_moe2dense.trainer.state import TrainState
from megatron_moe2dense.trainer.step import Models, student_pass
from megatron_moe2dense.trainer.watchdog import Watchdog


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
    speed: Speed
    lines: StepLines

    def close(self) -> None:
        """Flush the metrics and let the models go."""
        self.metrics.close()
        release(self.models.wrapped)

    def fit(self, state: TrainState) -> bool:
        """Train to the last step, or to the step at which a signal asks to stop; saved either way. True at the last step.

        Raises:
            UserError: loss or gradients stay NaN or infinite.
        """
        stop, watchdog = StopRequest(), Watchdog(self.config.train.timeout * 60)
        with stop.listening(), watchdog.watching(state.step):
            return self._fit(state, stop, watchdog)

    def _fit(self, state: TrainState, stop: StopRequest, watchdog: Watchdog) -> bool:
        config, steps = self.config, self.config.steps()
        while state.step < steps:
            self.advance(state)
            self._give_up_on(state)
            watchdog.reached(state.step)
            self.checkpointer.poll()
            if self.validation is not None and self._due(state.step, config.train.eval_every):
                self.evaluate(state)
                watchdog.reached(state.step)
            stopping = stop.agreed(self.training.device) and state.step < steps
            if stopping or self._due(state.step, config.train.save_every):
                self.checkpointer.save(self.models.student, self.optimizer, self.scheduler, asdict(state))
                watchdog.reached(state.step)
            if stopping:
                self.checkpointer.wait()
                logger.warning("asked to stop: saved step %d; the same command continues from there", state.step)
                return False
        self.checkpointer.wait()
        return True

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.config.steps() or (every is not None and step % every == 0)

    def advance(self, state: TrainState) -> float | None:
        """One step of the run, counted and logged. Returns the gradient norm, None when there was no update (see `optim.update`)."""
        facts = self._step(state)
        loss, usual, factor = facts.result.means[0], state.median_loss(), self.config.train.spike
        state.advance(facts.result.tokens, loss, updated=facts.grad_norm is not None)
        self._log(state, facts)
        if factor is not None and usual is not None and loss > factor * usual:
            self._log_spike(state, loss, usual)
        return facts.grad_norm

    def _step(self, state: TrainState) -> StepFacts:
        """One optimizer step; those whose line is logged are measured and their collectives timed."""
        started = time.perf_counter()
        loss = self.config.resolved_loss().at(state.step / self.config.steps())
        look_closer = self.lines.due(state.step + 1)
        with collectives.timed() if look_closer else contextlib.nullcontext() as waited:
            batches = self.training.micro_batches(*self._samples(state.step))
            read = time.perf_counter()
            for chunk in self.models.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            if self.config.moe is not None:
                balancing.weigh(self.config.moe, self.models.student, batches, self.groups)
            result = student_pass(self.models, [loss], batches, self.groups, measure=look_closer)
            self.scheduler.step(1)
            grad_norm = update(self.optimizer, gradients(self.models.wrapped), result.means[0])
        return StepFacts(
            result=result,
            is_kl=loss.is_plain_kl(),
            grad_norm=grad_norm,
            lr=max(group["lr"] for group in self.optimizer.param_groups),
            collective_seconds=waited.seconds if waited is not None else None,
            data_seconds=read - started,
            seconds=time.perf_counter() - started,
        )

    def _samples(self, step: int) -> tuple[int, int]:
        """First sample of the step that follows `step` finished ones, and how many."""
        return step * self.config.batch.global_, self.config.batch.global_

    def _give_up_on(self, state: TrainState) -> None:
        if state.skipped_in_a_row < self.config.train.most_skipped:
            return
        self.checkpointer.wait()
        first, _ = self._samples(state.step - state.skipped_in_a_row)
        last, size = self._samples(state.step - 1)
        raise UserError(
            f"{state.skipped_in_a_row} steps in a row without a finite loss and gradient, the last is {state.step}",
            "finite losses and gradients, of at least one prediction that is not masked",
            f"look at the data (samples {first} to {last + size - 1}), or start a run with a lower optim.lr in another output",
        )

    def evaluate(self, state: TrainState) -> None:
        """Held-out next-token loss and, with a live teacher, what there is to say of both, written as an eval row."""
        assert self.validation is not None
        teacher = self.models.teacher.of_other_text() if self.models.teacher is not None else None
        batches = self.validation.filled_up(self.config.data.validation_sequences)
        for chunk in self.models.student:
            chunk.eval()
        result = student_pass(replace(self.models, teacher=teacher), [], batches, self.groups, measure=True)
        for chunk in self.models.student:
            chunk.train()
        row = eval_row(state, result)
        self.metrics.write(row)
        said = f", KL {row['eval_kl']:.4f}, top-1 agreement {row['eval_top1_agreement']:.1%}" if row["eval_kl"] is not None else ""
        logger.info("step %d: held-out loss %.4f%s", state.step, row["eval_loss"], said)

    def _log(self, state: TrainState, facts: StepFacts) -> None:
        row = step_row(state, facts, self.speed, peak_memory_bytes())
        self.metrics.write(row)
        line = self.lines.ended(state.step, always=facts.grad_norm is None)
        if line is not None:
            norm = "skipped" if facts.grad_norm is None else f"{facts.grad_norm:.3f}"
            speed = f"{row['tokens_per_second']:,.0f}"
            logger.info("%s: loss %.4f, grad norm %s, lr %.2e, %s tokens/s", line, row["loss"], norm, facts.lr, speed)
        if not facts.result.tokens:
            first, size = self._samples(state.step - 1)
            logger.warning("step %d: every prediction of samples %d to %d is masked, no update", state.step, first, first + size - 1)

    def _log_spike(self, state: TrainState, loss: float, usual: float) -> None:
        first, size = self._samples(state.step - 1)
        logger.warning("step %d: loss %.4f, median of the last %.4f, samples %d to %d", state.step, loss, usual, first, first + size - 1)
        numbers = {"spike": loss / usual, "median_loss": usual, "first_sample": first, "last_sample": first + size - 1}
        self.metrics.write({"step": state.step, "tokens": state.tokens, **numbers})
