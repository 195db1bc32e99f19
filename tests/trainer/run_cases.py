"""What runs inside the worker processes of the tests of the run around the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.config import DistillConfig


@contextmanager
def _trainer(config: dict[str, Any]) -> Iterator[Any]:
    """A trainer and its state inside Megatron's session."""
    from megatron_moe2dense.trainer import distill, groups, runtime

    settings = build(DistillConfig, config, "the test")
    with runtime.session(settings.device) as device, groups.initialized(settings.parallel, settings.train.seed) as layout:
        distill.claim_output(settings)
        trainer, state = distill.build(settings, layout, device)
        with closing(trainer):
            yield trainer, state


def _everything(trainer: Any) -> list[Tensor]:
    """Copies of all weights, master weights and optimizer state of this rank."""
    weights = [parameter for chunk in trainer.models.student for parameter in chunk.parameters()]
    inner = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    masters = [parameter for adam in inner for group in adam.param_groups for parameter in group["params"]]
    moments = [tensor for adam in inner for entry in adam.state.values() for tensor in entry.values() if torch.is_tensor(tensor)]
    return [tensor.detach().clone() for tensor in (*weights, *masters, *moments)]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda gradient: gradient * float("nan"),
    "infinity": lambda gradient: gradient + float("inf"),
    "overflowing norm": lambda gradient: gradient * 0 + 1e30,  # finite, its square is not
}


def poisoned_steps(cases: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    """Three steps of each run; in the second the last rank's gradient of one parameter is poisoned."""
    found = []
    for config, poison in cases:
        with _trainer(config) as (trainer, state):
            parameter = next(p for p in trainer.models.student[-1].decoder.parameters() if p.dim() > 1)
            norms, kept = [], []
            for step in range(3):
                hook = None
                if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                    hook = parameter.register_hook(POISONS[poison])
                before = _everything(trainer)
                norms.append(trainer.advance(state))
                kept.append(_same(before, _everything(trainer)))
                if hook is not None:
                    hook.remove()
            healthy = all(bool(torch.isfinite(tensor).all()) for tensor in _everything(trainer))
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, (kept, healthy, [norm is None for norm in norms]))
            found.append({"ranks": ranks, "total": state.skipped_total, "in_a_row": state.skipped_in_a_row, "step": state.step})
    return found


def random_numbers(config: dict[str, Any], other_layout: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Numbers that each rank draws after a save, after a resume from it in the same layout, and in another one."""
    from megatron.core import tensor_parallel

    def draw() -> list[list[float]]:
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        with tracker.fork():
            forked = torch.rand(3).tolist()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, torch.rand(3).tolist() + forked)
        return ranks

    with _trainer(config) as (trainer, state):
        torch.manual_seed(100 + dist.get_rank())
        draw()
        trainer.advance(state)
        trainer.checkpointer.save(trainer.models.student, trainer.optimizer, trainer.scheduler, vars(state))
        found = {"straight": draw()}
        trainer.checkpointer.wait()
    with _trainer(config):
        found["resumed"] = draw()
    with _trainer(other_layout):
        found["other layout"] = draw()
    return found
