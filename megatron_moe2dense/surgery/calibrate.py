"""`moe2dense calibrate`: runs a MoE over calibration text, layer by layer, and writes the sums of docs/method.md#statistics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.progress import Progress
from megatron_moe2dense.compute.device import chosen_dtype, open_device
from megatron_moe2dense.compute.ranks import Ranks, joined
from megatron_moe2dense.surgery.config import CalibrateConfig
from megatron_moe2dense.surgery.experts import Experts
from megatron_moe2dense.surgery.hidden import HiddenStates
from megatron_moe2dense.surgery.observe import Observer, chunk_tokens, runs_every_expert
from megatron_moe2dense.surgery.resume import Resume
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import (
    INPUT_GATE_STATISTICS,
    SHARED_GATE_STATISTICS,
    STATISTICS,
    STATS_FILE,
    LayerStats,
    Statistic,
    chosen_statistics,
    save_stats,
)
from megatron_moe2dense.surgery.stream import Compute, StreamedModel, StreamSource
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import windows


class PassConfig(Protocol):
    """The keys of a config that say how the calibration text runs through the model."""

    @property
    def data(self) -> TokensConfig: ...  # noqa: D102
    @property
    def batch_tokens(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class TextPass:
    """A PassConfig of its own, for commands that read text only in some cases."""

    data: TokensConfig
    batch_tokens: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Job:
    """The processes that share a calibration, and what of it is on disk."""

    ranks: Ranks
    resume: Resume


def run(config: CalibrateConfig) -> None:
    """Write `<output>/stats.safetensors` and its manifest. Under torchrun every process takes a share of the windows.

    Raises:
        UserError: the source is no supported or no sound MoE, the tokens do not fit it, the output exists.
    """
    with joined() as ranks:
        source = MoeSource.open(config.source)
        windows_BS = windows(config.data, source.dims)
        compute, names = chosen_compute(config, ranks), chosen_statistics(config.statistics)
        share_BS = ranks.share(windows_BS, compute.batch)
        facts = {"source": source.facts(), "data": data_facts(windows_BS), "compute": compute_facts(compute, ranks)}
        identity = [{**facts, "source": source.fingerprint}, names, hashlib.sha256(windows_BS.tobytes()).hexdigest()]
        output = Path(config.output)
        with ranks.output_directory(output, "calibrate", config.model_dump(mode="json"), **facts) as working:
            resume = Resume(working, identity, ranks, config.memory_budget)
            sums = calibrate(source, share_BS, names, compute, Job(ranks, resume))
            if ranks.rank == 0:
                save_stats(working / STATS_FILE, sums)
            resume.remove()
        if ranks.rank == 0:
            print(f"{output}: statistics of {len(source.layers)} layers x {source.dims.experts} experts over {windows_BS.size:,} tokens")


def calibrate(source: MoeSource, windows_BS: np.ndarray, names: tuple[str, ...], compute: Compute, job: Job) -> dict[int, LayerStats]:
    """The statistics `names` of every MoE layer, by layer number, over the windows of all ranks; `windows_BS` are this one's."""
    resume = job.resume
    finished = [layer for layer in source.layers if layer < resume.start]
    sums = {layer: resume.sums(layer) for layer in finished}
    with (
        CheckpointReader(source.index) as reader,
        Progress("calibrate", "layer", len(source.layers), done=len(finished), each=True) as shown,
    ):
        observer = _Counted(source, (*names, *_of_gates(source)), shown, windows_BS.size)
        for hidden in StreamedModel(source, reader, compute).run(windows_BS, observer, resume.place, resume.start):
            require_finite(hidden, source)
            if hidden.layer > resume.start:
                done = hidden.layer - 1
                if done in source.layers:
                    sums[done] = LayerStats(job.ranks.sum(observer.take().sums))
                resume.finish_layer(done, sums.get(done), hidden)
                shown.reached(len(sums))
    return sums


class _Counted(Observer):
    """Shows how far it came, within a layer too. tokens: of this process."""

    def __init__(self, source: MoeSource, names: Iterable[str], shown: Progress, tokens: int):
        super().__init__(source, names)
        self._shown, self._tokens = shown, tokens

    def routed(self, layer: int, x_TD: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
        """Of one batch."""
        routed = super().routed(layer, x_TD, routing, experts)
        self._shown.update(len(x_TD) / self._tokens)
        return routed


def require_finite(hidden: HiddenStates, source: StreamSource) -> None:
    """UserError when a hidden state is NaN or infinite."""
    if not all(torch.isfinite(x_BSD).all() for x_BSD in hidden):
        raise UserError(
            f"{source.index.directory}: hidden states with NaN or infinite values",
            "finite hidden states on the calibration text",
            "use dtype=float32, and check that config.json belongs to the weights",
        )


def chosen_compute(config: PassConfig, ranks: Ranks) -> Compute:
    """Device, dtype and windows of a forward pass; UserError for a device this machine does not have."""
    device = open_device(config.device, ranks)
    dtype = chosen_dtype(config.dtype, device.type)
    return Compute(device, getattr(torch, dtype), max(1, config.batch_tokens // config.data.sequence_length))


def compute_facts(compute: Compute, ranks: Ranks) -> dict[str, Any]:
    """What manifests record of the computation."""
    dtype = str(compute.dtype).removeprefix("torch.")
    return {"device": compute.device.type, "processes": ranks.world, "dtype": dtype, "batch": compute.batch}


def data_facts(windows_BS: np.ndarray) -> dict[str, Any]:
    """What manifests record of the calibration text."""
    return {"sequences": len(windows_BS), "sequence_length": windows_BS.shape[1], "tokens": windows_BS.size}


def _of_gates(source: MoeSource) -> dict[str, Statistic]:
    """The statistics that are collected whatever the config says: convert needs them."""
    of_shared = SHARED_GATE_STATISTICS if source.stock.moe[source.layers[0]].shared_gate is not None else {}
    return {**of_shared, **(INPUT_GATE_STATISTICS if source.facts_of_block.gates_inputs else {})}


def dry_run(config: CalibrateConfig) -> dict[str, Any]:
    """What would be read and written (bytes), the FLOPs and the memory (bytes)."""
    source = MoeSource.open(config.source)
    windows_BS = windows(config.data, source.dims)
    ranks = Ranks(0, int(os.environ.get("WORLD_SIZE", "1")))
    compute, dims, names = chosen_compute(config, ranks), source.dims, chosen_statistics(config.statistics)
    run_experts = dims.experts if runs_every_expert(names) else dims.active
    expert_params = 3 * dims.hidden_size * dims.expert_width
    block = {
        name for layer in source.layers for name in (*source.expert_names(layer), *source.router_names(layer), *source.shared_names(layer))
    }
    block |= set(source.account.left_out)
    rest = sum(int(np.prod(info.shape)) for name, info in source.index.tensors.items() if name not in block)
    per_token = 2 * rest + len(source.layers) * 2 * run_experts * expert_params
    per_token += len(source.layers) * 2 * 3 * dims.hidden_size * dims.shared_width
    per_token += len(source.layers) * 2 * dims.experts**2 * dims.hidden_size * ("gram" in names)
    element = compute.dtype.itemsize
    per_expert_token = (2 * dims.expert_width + dims.hidden_size) * element
    rows = [*(STATISTICS[name] for name in names), *_of_gates(source).values()]
    sums = sum(int(np.prod(row.shape(dims.experts, dims.hidden_size, dims.expert_width))) for row in rows) * 8
    hidden = ranks.share(windows_BS, compute.batch).size * dims.hidden_size * element
    widest = max(2 * dims.expert_width, dims.hidden_size)
    return {
        "source": {"family": source.family, "layers": len(source.layers), "experts": dims.experts, "active": dims.active},
        "data": data_facts(windows_BS),
        "compute": compute_facts(compute, ranks),
        "reads": {str(source.index.directory): source.index.nbytes, config.data.path: windows_BS.size * 2},
        "writes": {config.output: sums * len(source.layers)},
        "flops": per_token * windows_BS.size,
        "memory_bytes": {
            "experts of one layer, and of the next on their way": 2 * dims.experts * expert_params * element,
            f"hidden states of one process ({'disk' if hidden > config.memory_budget else 'memory'})": hidden,
            "expert outputs of a chunk": chunk_tokens(dims.experts, widest, compute.device) * per_expert_token * run_experts,
        },
    }
