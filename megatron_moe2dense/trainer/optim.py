"""Megatron-Core's AdamW and learning-rate scheduler, and the DDP wrapper that feeds them."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT


def wrap(chunks: list[HeadlessGPT], config: DistillConfig, groups: Groups) -> list[DistributedDataParallel]:
    """Every chunk's gradients in float32 buffers, reduced over data-parallel ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed(config, groups),
        check_for_nan_in_grad=False,
    )
    return [DistributedDataParallel(chunk.config, settings, chunk, pg_collection=groups.collection) for chunk in chunks]


def distributed(config: DistillConfig, groups: Groups) -> bool:
    """Whether optimizer state is sharded."""
    return config.parallel.distributed_optimizer and groups.data_size > 1


def build(
    config: DistillConfig, chunks: list[DistributedDataParallel], groups: Groups
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the wrapped chunks, and its schedule over `config.steps()` steps."""
    half = config.dtype == "bfloat16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optim.lr,
        min_lr=config.optim.lr * config.schedule.final,
        weight_decay=config.optim.weight_decay,
        adam_beta1=config.optim.betas[0],
        adam_beta2=config.optim.betas[1],
        adam_eps=config.optim.eps,
        clip_grad=config.optim.clip,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=distributed(config, groups),
    )
    optimizer = get_megatron_optimizer(settings, list(chunks))
    shared = chunks[0].config  # one object, shared by all chunks
    shared.grad_scale_func = optimizer.scale_loss
    shared.finalize_model_grads_func = finalize_model_grads
    steps = config.steps()
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optim.lr,
        min_lr=config.optim.lr * (config.schedule.final if config.schedule.style != "constant" else 1.0),
        lr_warmup_steps=round(steps * config.schedule.warmup),
        lr_decay_steps=steps,
        lr_decay_style=config.schedule.style,
        start_wd=config.optim.weight_decay,
        end_wd=config.optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
