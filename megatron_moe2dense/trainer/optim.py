"""Megatron-Core's AdamW and learning-rate scheduler, Muon beside it where the config asks, and the DDP wrapper that feeds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_moe2dense.trainer import muon
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec


def wrap(chunks: list[HeadlessGPT], config: DistillConfig, groups: Groups) -> list[DistributedDataParallel]:
    """Every chunk's gradients in float32 buffers, reduced over data-parallel ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
        overlap_grad_reduce=_overlaps(config),
    )
    return [DistributedDataParallel(chunk.config, settings, chunk, pg_collection=groups.collection) for chunk in chunks]


def _overlaps(config: DistillConfig) -> bool:
    if config.parallel.overlap_gradients is not None:
        return config.parallel.overlap_gradients
    return torch.cuda.is_available() and config.resolved_loss().trains_head()


def build(
    config: DistillConfig, chunks: list[DistributedDataParallel], model: tuple[ModelSpec, Groups], first_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the wrapped chunks, or over what Muon leaves to it, and the schedule over `config.steps()` steps.

    Args:
        first_steps: see `learning_rate`.

    Raises:
        UserError: Muon for a MoE.
    """
    half = config.dtype == "bfloat16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optim.lr,
        min_lr=config.optim.lr * config.schedule.resolved_final(),
        weight_decay=config.optim.weight_decay,
        adam_beta1=config.optim.betas[0],
        adam_beta2=config.optim.betas[1],
        adam_eps=config.optim.eps,
        clip_grad=config.optim.clip,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,  # also for one data-parallel rank: one checkpoint format
    )
    if config.optim.muon is None:
        optimizer = get_megatron_optimizer(settings, list(chunks))
    else:
        optimizer = muon.beside_adamw(config.optim.muon, settings, chunks, model)
    shared: Any = chunks[0].config  # one object, shared by all chunks
    shared.grad_scale_func = optimizer.scale_loss
    shared.finalize_model_grads_func = finalize_model_grads
    if _overlaps(config):
        only_last = [chunk.no_sync for chunk in chunks]  # the gradients of a step's other micro-batches just add up
        shared.no_sync_func = only_last if len(only_last) > 1 else only_last[0]
    return optimizer, learning_rate(config, config.steps(), first_steps, optimizer)


def release(chunks: Iterable[DistributedDataParallel]) -> None:
    """Untie the models from their optimizer: DDP's hooks on gradients close cycles through C++, which Python can not collect."""
    for chunk in chunks:
        chunk.grad_accs.clear()
        shared: Any = chunk.config
        shared.grad_scale_func = shared.no_sync_func = None


def learning_rate(config: DistillConfig, steps: int, first_steps: int, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up from 0 to optim.lr, then `schedule.style` down to its `final` share; sets the learning rate of step 0.

    Args:
        steps: of the run. first_steps: those it was begun with, of which the warm-up is a share; fewer when it has been extended.
    """
    settings, peak = config.schedule, config.optim.lr
    wsd = settings.style == "wsd"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=peak * settings.resolved_final(),
        lr_warmup_steps=min(round(first_steps * settings.warmup), first_steps - 1),  # one of the whole run is none of Megatron's
        lr_decay_steps=steps,
        lr_decay_style="WSD" if wsd else settings.style,
        start_wd=config.optim.weight_decay,
        end_wd=config.optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, round(steps * settings.resolved_decay())) if wsd else None,
        lr_wsd_decay_style=(settings.shape or "minus_sqrt") if wsd else None,
        use_checkpoint_opt_param_scheduler=False,  # a checkpoint knows the step; the run's length may have grown since
        override_opt_param_scheduler=True,
    )


def learning_rate_at(config: DistillConfig, step: int, steps: int, first_steps: int) -> float:
    """What AdamW's learning rate is after `step` of `steps` steps; see `learning_rate`."""
    group: dict[str, Any] = {}
    nothing: Any = SimpleNamespace(param_groups=[group])
    learning_rate(config, steps, first_steps, nothing).step(step)
    return group["lr"]


def gradients(chunks: list[DistributedDataParallel]) -> list[Tensor]:
    """This rank's gradient buffers [float32, one-dimensional], expert-parallel ones among them."""
    wrapped: Any = chunks  # their `buffers` hide the method of torch modules
    return [buffer.grad_data for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


@torch.no_grad()
def update(optimizer: MegatronOptimizer, buffers: Iterable[Tensor], loss: float) -> float | None:
    """Clip and step, unless loss or gradients are not finite anywhere. Returns the gradient norm before clipping, None for no update.

    Without an update weights, master weights and Adam's moments stay as they are, on every rank. Megatron's own `step` looks for NaN only
    with a loss scaler (float16); its clipping lets NaN through, and an infinite norm would make every gradient 0.

    Args:
        optimizer: over the wrapped chunks. buffers: their `gradients`. loss: of the step.
    """
    assert isinstance(optimizer, ChainedOptimizer)
    assert optimizer.config is not None
    healthy = math.isfinite(loss) and all(_is_finite(buffer) for buffer in buffers)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    unhealthy = torch.tensor(float(not (healthy and math.isfinite(norm))), device=optimizer.get_loss_scale().device)
    dist.all_reduce(unhealthy, op=dist.ReduceOp.MAX)
    if unhealthy:
        return None
    clip = optimizer.config.clip_grad
    for part in optimizer.chained_optimizers:
        parameters: list[Tensor] = list(part.get_parameters())
        if clip > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, clip, norm)
    optimizer.step_with_ready_grads()
    return norm


def _is_finite(gradients: Tensor) -> bool:
    """One pass without a copy; the extremes are NaN where anything is."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(gradients))).all()) if gradients.numel() else True
