"""The frozen teacher: a MoE in the same job and on the same devices, expert-parallel inside the data-parallel ranks."""

from __future__ import annotations

from pathlib import Path

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.families import Dims
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import weights
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.runtime import Runtime


def build(config: DistillConfig, student: models.Blueprint, groups: Groups, runtime: Runtime) -> models.HeadlessGPT:
    """Load the teacher, in eval mode, without gradients.

    Raises:
        UserError: another vocabulary than the student's, or more active experts asked for than there are.
    """
    assert config.teacher is not None
    directory = Path(config.teacher)
    blueprint = models.Blueprint.of(CheckpointIndex.open(directory).config, str(directory), student.dtype)
    if blueprint.dims.vocab_size != student.dims.vocab_size:
        raise UserError(
            f"teacher vocabulary {blueprint.dims.vocab_size}, student vocabulary {student.dims.vocab_size}",
            "one vocabulary",
            "distil into a student made from this teacher, or one with its tokenizer",
        )
    overrides = {"moe_router_topk": _active(config, blueprint.dims)} if blueprint.dims.experts else {}
    model = models.build(blueprint, groups, runtime, **overrides)
    weights.load(model, blueprint, groups, directory)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    logger.info("teacher: %s, %d layers, %d parameters on this rank", directory, blueprint.dims.layers, _count(model))
    return model.eval()


def _active(config: DistillConfig, dims: Dims) -> int:
    active = config.teacher_routing.active if config.teacher_routing else None
    if active is None:
        return dims.active
    if not dims.active <= active <= dims.experts:
        raise UserError(f"teacher_routing.active: {active}", f"between {dims.active} and {dims.experts}", "choose a number in this range")
    return active


def _count(model: models.HeadlessGPT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
