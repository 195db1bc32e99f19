"""The same weights under two layer specs (Transformer Engine's, the local one) or types: logits, loss and gradients side by side."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe2dense.operations.smoke.report import Row
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import weights
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime

# What two right implementations in bfloat16 may differ by (ours). On a CPU, bfloat16 against float32 through the local spec, the pico MoE
# stays below a third of each; medians, since a token whose experts change by rounding moves few tensors far.
LOGITS, LOSS, GRADIENTS = 5e-2, 1e-2, 1e-1


@dataclass(frozen=True)
class Side:
    """One way to compute. The device of both sides is the same."""

    name: str
    runtime: Runtime
    dtype: torch.dtype


@dataclass(frozen=True)
class Pass:
    """Logits [T, V] in float32, mean next-token loss [nats], gradients by the tensors of the stock class, and the expert."""

    logits_TV: Tensor
    loss: float
    gradients: dict[Any, Tensor]


def one_pass(directory: Path, tokens_BS: Tensor, side: Side, groups: Groups) -> Pass:
    """Load the checkpoint, then one forward and backward pass over the tokens; one process."""
    spec = models.ModelSpec.open(directory, side.dtype)
    chunks = models.build(spec, groups, side.runtime, PipelineLayout.of_student(groups.parallel, spec.dims.layers))
    weights.load(chunks, spec, groups)
    inputs, labels = tokens_BS[:, :-1], tokens_BS[:, 1:]
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    hidden = chunks[0](inputs, positions, None)
    logits_TV = chunks[0].parallel_logits(hidden, spec.dims.vocab_size).logits(slice(None))
    loss = torch.nn.functional.cross_entropy(logits_TV.float(), labels.t().flatten())  # tokens are sequence-major
    loss.backward()
    found = weights.weights_of_rank(chunks, spec, groups)
    gradients = {(entry.names, entry.expert): weight.grad.float() for weight, entry, *_ in found if weight.grad is not None}
    return Pass(logits_TV.detach().float(), loss.item(), gradients)


def compare(directory: Path, tokens_BS: Tensor, sides: tuple[Side, Side], groups: Groups) -> list[Row]:
    """Rows for logits (median over tokens of the relative error), loss (relative) and gradients (median over tensors)."""
    one, other = (one_pass(directory, tokens_BS, side, groups) for side in sides)
    name = f"{sides[0].name} against {sides[1].name}"
    error_T = (one.logits_TV - other.logits_TV).norm(dim=1) / other.logits_TV.norm(dim=1)
    same = one.gradients.keys() == other.gradients.keys()
    gradients = [_relative(one.gradients[key], other.gradients[key]) for key in other.gradients] if same else [float("nan")]
    figures = {
        "logits": (error_T.median().item(), LOGITS),
        "loss": (abs(one.loss - other.loss) / abs(other.loss), LOSS),
        "gradients": (statistics.median(gradients), GRADIENTS),
    }
    return [Row(f"{what}, {name}", f"{value:.2e}", value <= bound, f"<= {bound:.0e}") for what, (value, bound) in figures.items()]


def _relative(found: Tensor, wanted: Tensor) -> float:
    size = wanted.norm().item()
    difference = (found - wanted).norm().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def kernels(directory: Path, tokens_BS: Tensor, side: Side, groups: Groups) -> list[str]:
    """Names of what ran longest in one pass: CUDA kernels on a GPU, operators on a CPU."""
    on_gpu = side.runtime.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        one_pass(directory, tokens_BS, side, groups)
    events = sorted(profile.key_averages(), key=lambda event: event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    return [event.key for event in reversed(events)]
