"""What runs inside the processes of the parity table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.config import DistillConfig
from tests.trainer.stock import Samples, StockRun


def samples(raw: dict[str, Any]) -> list[Samples]:
    """What a single process reads at every step."""
    from megatron_moe2dense.trainer import distill, groups, runtime

    config = build(DistillConfig, raw, "the test")
    with runtime.session(config.device) as device, groups.initialized(config.parallel, config.train.seed) as place:
        distill.claim_output(config)
        trainer, _ = distill.build(config, place, device)
        size, found = config.batch.global_, []
        for step in range(config.steps()):
            batches = trainer.training.micro_batches(step * size, size)
            found.append(Samples(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels", "mask"))))
        trainer.close()
    return found


def differences(cases: dict[str, tuple[dict[str, Any], StockRun]]) -> dict[str, dict[str, float]]:
    """Train each case, and compare on every rank what stands there."""
    return {name: _differences(build(DistillConfig, raw, name), expected) for name, (raw, expected) in cases.items()}


def _differences(config: DistillConfig, expected: StockRun) -> dict[str, float]:
    from megatron_moe2dense.trainer import distill, groups, runtime

    with runtime.session(config.device) as device, groups.initialized(config.parallel, config.train.seed) as place:
        distill.claim_output(config)
        trainer, state = distill.build(config, place, device)
        recorder = _Recorder(trainer)
        dataclasses.replace(trainer, metrics=recorder, checkpointer=Mock()).fit(state)  # checkpoints have tests of their own
        rows = recorder.rows
        assert len(rows) == len(expected.losses)
        pairs = zip(rows, expected.losses, expected.norms, strict=True)
        loss = max(max(abs(row["loss"] / value - 1), abs(row["grad_norm"] / norm - 1)) for row, value, norm in pairs)
        # the product's own way to a rank's slices: the references replace the weights, which are not needed any more
        spec = distill.opened_models(config).specs["student"]
        found = [{number: tensor.clone() for number, tensor in _parameters(trainer)}, *recorder.gradients]
        names = ["weights", *(f"gradients_{step}" for step in range(1, len(rows) + 1))]
        worst = [_worst(trainer, spec, values, expected.directory / name) for values, name in zip(found, names, strict=True)]
        trainer.close()
        return {"loss": loss, "weights": worst[0], "gradients": worst[1], "later_gradients": max(worst[2:])}


class _Recorder:
    """Stands for the run's metrics: keeps the row of every step and this rank's gradients, as they stand after the update."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.rows: list[dict[str, Any]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.gradients.append({name: parameter.main_grad.clone() for name, parameter in _parameters(self._trainer)})


def _parameters(trainer: Any) -> Iterator[tuple[str, Any]]:
    for number, chunk in enumerate(trainer.models.student):
        for name, parameter in chunk.named_parameters():
            yield f"{number} {name}", parameter


@torch.no_grad()
def _worst(trainer: Any, spec: Any, found: dict[str, Tensor], reference: Path) -> float:
    """The largest relative difference in norm of one tensor, its slices put together over all ranks."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_moe2dense.families.account import Account
    from megatron_moe2dense.trainer import weights

    weights.load(trainer.models.student, dataclasses.replace(spec, account=Account.open(reference)), trainer.groups)
    squares: dict[str, tuple[float, float]] = {}
    for name, parameter in _parameters(trainer):
        number, local = name.split(" ", 1)
        chunk = trainer.models.student[int(number)]
        owned = _owned(trainer, parameter) if reference.name.startswith("gradients") else slice(None)
        want, have = parameter.double().flatten()[owned], found[name].double().flatten()[owned]
        key = f"{get_transformer_layer_offset(chunk.config, chunk.vp_stage)} {local}"
        squares[key] = ((want - have).square().sum().item(), want.square().sum().item())
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, squares)
    ratios = {}
    for key in {key for rank in everywhere for key in rank}:
        off, size = (sum(rank[key][i] for rank in everywhere if key in rank) for i in (0, 1))
        # an expert without tokens has gradient 0
        ratios[key] = math.sqrt(off / size) if size else (math.inf if off else 0.0)
    return max(ratios.values())


def _owned(trainer: Any, parameter: Tensor) -> slice:
    """The part of the flattened gradient that this rank has reduced: all of it, or its shard of the distributed optimizer."""
    sharded = [part for part in trainer.optimizer.chained_optimizers if hasattr(part, "model_param_gbuf_map")]
    if not sharded:
        return slice(None)
    for optimizer in sharded:
        if parameter in optimizer.model_param_gbuf_map:
            kept = optimizer._get_model_param_range_map(parameter)["param"]
            return slice(kept.start, kept.end)
    return slice(0, 0)
