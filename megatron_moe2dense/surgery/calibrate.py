"""`moe2dense calibrate`: runs a MoE over calibration text, layer by layer, and writes the sums of method.md section 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import output_directory
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.surgery.config import CalibrateConfig
from megatron_moe2dense.surgery.experts import MoeWeights
from megatron_moe2dense.surgery.observe import Observation, chunk_tokens
from megatron_moe2dense.surgery.routing import route
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import SHARED_GATE_STATISTICS, STATISTICS, STATS_FILE, LayerStats, chosen_statistics, save_stats
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from megatron_moe2dense.tokens.indexed import windows


def run(config: CalibrateConfig) -> None:
    """Write `<output>/stats.safetensors` and its manifest.

    Raises:
        UserError: the source is no supported or no sound MoE, the tokens do not fit it, the output exists.
    """
    source = MoeSource.open(config.source)
    windows_BS = windows(config.data, source.dims.vocab_size)
    compute = _compute(config)
    facts = {"source": source.facts(), "data": _data_facts(windows_BS), "compute": _compute_facts(compute)}
    output = Path(config.output)
    with output_directory(output, "calibrate", config.model_dump(mode="json"), **facts) as working:
        save_stats(working / STATS_FILE, calibrate(source, windows_BS, chosen_statistics(config.statistics), compute))
    print(f"{output}: statistics of {len(source.layers)} layers x {source.dims.experts} experts over {windows_BS.size:,} tokens")


def calibrate(source: MoeSource, windows_BS: np.ndarray, names: tuple[str, ...], compute: Compute) -> dict[int, LayerStats]:
    """The statistics `names` of every MoE layer, by layer number."""
    sums: dict[int, LayerStats] = {}

    if source.tensors.shared_gate is not None:
        names = (*names, *SHARED_GATE_STATISTICS)

    def observe(layer: int, x_TD: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        outputs = []
        for chunk_TD in x_TD.split(_chunk(source, x_TD.device)):
            routing = route(chunk_TD, weights.router, source.router, source.dims.active)
            observation = Observation(chunk_TD, routing, weights, names)
            stats = LayerStats({name: value.cpu().numpy() for name, value in observation.sums().items()})
            sums[layer] = sums[layer] + stats if layer in sums else stats
            outputs.append(observation.output())
        bar.update(len(x_TD))
        return torch.cat(outputs)

    total = windows_BS.size * len(source.layers)
    with (
        CheckpointReader(source.index) as reader,
        progress(None, "calibrate", unit="token", total=total, unit_scale=True) as bar,
    ):
        for hidden in StreamedModel(source, reader, compute).run(windows_BS, observe):
            _require_finite(hidden, source)
    return sums


def _require_finite(hidden: list[torch.Tensor], source: MoeSource) -> None:
    if not all(torch.isfinite(x_BSD).all() for x_BSD in hidden):
        raise UserError(
            f"{source.index.directory}: hidden states with NaN or infinite values",
            "finite hidden states on the calibration text",
            "use dtype=float32, and check that config.json belongs to the weights",
        )


def _chunk(source: MoeSource, device: torch.device) -> int:
    return chunk_tokens(source.dims.experts, max(2 * source.dims.expert_width, source.dims.hidden_size), device)


def _compute(config: CalibrateConfig) -> Compute:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r}: {reason}", "a torch device of this machine", "use device=cpu, or auto") from None
    dtype = config.dtype if config.dtype != "auto" else ("float32" if device.type == "cpu" else "bfloat16")
    return Compute(device, getattr(torch, dtype), max(1, config.batch_tokens // config.data.sequence_length))


def _compute_facts(compute: Compute) -> dict[str, Any]:
    return {"device": str(compute.device), "dtype": str(compute.dtype).removeprefix("torch."), "batch": compute.batch}


def _data_facts(windows_BS: np.ndarray) -> dict[str, Any]:
    return {"sequences": len(windows_BS), "sequence_length": windows_BS.shape[1], "tokens": windows_BS.size}


def dry_run(config: CalibrateConfig) -> dict[str, Any]:
    """What would be read and written (bytes), the FLOPs and the memory (bytes)."""
    source = MoeSource.open(config.source)
    windows_BS = windows(config.data, source.dims.vocab_size)
    compute, dims, names = _compute(config), source.dims, chosen_statistics(config.statistics)
    every = any(STATISTICS[name].every_expert for name in names)
    run_experts = dims.experts if every else dims.active
    expert_params = 3 * dims.hidden_size * dims.expert_width
    block = {name for layer in source.layers for name in source.block_names(layer)}
    rest = sum(int(np.prod(info.shape)) for name, info in source.index.tensors.items() if name not in block)
    per_token = 2 * rest + len(source.layers) * 2 * run_experts * expert_params
    per_token += len(source.layers) * 2 * dims.experts**2 * dims.hidden_size * ("gram" in names)
    element = compute.dtype.itemsize
    per_expert_token = (2 * dims.expert_width + dims.hidden_size) * element
    sums = sum(int(np.prod(STATISTICS[name].shape(dims.experts, dims.hidden_size))) for name in names) * 8
    return {
        "source": {"family": source.spec.name, "layers": len(source.layers), "experts": dims.experts, "active": dims.active},
        "data": _data_facts(windows_BS),
        "compute": _compute_facts(compute),
        "reads": {str(source.index.directory): source.index.nbytes, config.data.path: windows_BS.size * 2},
        "writes": {config.output: sums * len(source.layers)},
        "flops": per_token * windows_BS.size,
        "memory_bytes": {
            "experts of one layer": dims.experts * expert_params * element,
            "hidden states (cpu)": windows_BS.size * dims.hidden_size * element,
            "expert outputs of a chunk": _chunk(source, compute.device) * per_expert_token * run_experts,
        },
    }
