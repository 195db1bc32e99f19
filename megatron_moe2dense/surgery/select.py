"""`moe2dense select`: the neurons of each dense FFN chosen one by one out of all experts of its layer (ours). Writes a plan.json.

All neurons of a layer are ranked by the energy that calibration summed up; a method that looks further gets the ranking's first, with
the normal equations of the routed experts' output on their activations, every one run on every token as a dense FFN will.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.compute.ranks import Ranks, joined
from megatron_moe2dense.surgery.calibrate import Job, TextPass, chosen_compute, compute_facts, data_facts, require_finite
from megatron_moe2dense.surgery.config import SelectConfig
from megatron_moe2dense.surgery.convert import require_same_source
from megatron_moe2dense.surgery.experts import Experts
from megatron_moe2dense.surgery.layout import padding, room
from megatron_moe2dense.surgery.neurons import NeuronSelector, selectors
from megatron_moe2dense.surgery.observe import Observer
from megatron_moe2dense.surgery.plan import ConversionPlan, input_scale, shared_scale
from megatron_moe2dense.surgery.refit.normal import Sums
from megatron_moe2dense.surgery.resume import Resume
from megatron_moe2dense.surgery.rewrite import PLAN_FILE
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from megatron_moe2dense.surgery.types import NeuronPlan
from megatron_moe2dense.tokens.indexed import windows

_NEEDS = ("gate_sum", "neuron_energy")


def run(config: SelectConfig) -> None:
    """Write `<output>/plan.json` and its manifest. Under torchrun every process takes a share of the windows.

    Raises:
        UserError: statistics of another model or without energies, more neurons than a layer has, the output exists.
    """
    with joined() as ranks:
        source, statistics, groups = _inputs(config)
        width = room(source, groups)
        config = config.model_copy(update={"pad_to": 1 if width == groups * source.dims.expert_width else config.pad_to})
        facts: dict[str, Any] = {"source": source.facts()}
        with (
            CheckpointReader(source.index) as reader,
            ranks.output_directory(Path(config.output), "select", config.model_dump(mode="json"), **facts) as working,
        ):
            ranked = {layer: _ranking(output_energy(source, reader, layer, stats)) for layer, stats in statistics.layers.items()}
            chosen = {layer: ranking[:width] for layer, ranking in ranked.items()}
            if config.data is not None:
                candidates = {layer: ranking[: config.select.candidates(width)] for layer, ranking in ranked.items()}
                chosen = _Pass(source, reader, config.select, width, candidates).run(config, ranks, working)
            plan = _plan(config, source, {layer: (statistics.layers[layer], found) for layer, found in chosen.items()}, groups)
            if ranks.rank == 0:
                plan.write(working / PLAN_FILE)
        if ranks.rank == 0:
            print(f"{config.output}: {width} neurons of {source.dims.experts * source.dims.expert_width} in {len(chosen)} layers")


def _inputs(config: SelectConfig) -> tuple[MoeSource, CalibratedStats, int]:
    source, statistics = MoeSource.open(config.source, pad_to=config.pad_to), CalibratedStats.open(config.statistics)
    require_same_source(f"{config.statistics}: statistics", statistics.source, source)
    statistics.require(_NEEDS)
    groups = config.groups or source.dims.active
    if groups > source.dims.experts:
        raise UserError(f"groups={groups}", f"1 to {source.dims.experts}, the experts of a layer", "choose another groups")
    return source, statistics, groups


def output_energy(source: MoeSource, reader: CheckpointReader, layer: int, stats: LayerStats) -> np.ndarray:
    """Of all neurons, float64 [E, I]: gated activation energy times squared norm of the down column."""
    columns_EI = np.stack(
        [
            source.expert(source.reader(reader), layer, expert).down_DF.double().square().sum(0).numpy()
            for expert in range(source.dims.experts)
        ]
    )
    return stats["neuron_energy"] * columns_EI


def _ranking(energy_EI: np.ndarray) -> np.ndarray:
    """All neurons, expert * I + place, by their energy; ties go to the lower number."""
    return np.argsort(-energy_EI.ravel(), kind="stable")


@dataclass(frozen=True)
class _Pass:
    """The teacher over the text, for the normal equations. candidates: neurons by layer, best first."""

    source: MoeSource
    reader: CheckpointReader
    selector: NeuronSelector
    width: int
    candidates: dict[int, np.ndarray]

    @torch.no_grad()
    def run(self, config: SelectConfig, ranks: Ranks, working: Path) -> dict[int, np.ndarray]:
        """The chosen neurons of each layer; goes on after the last layer that an earlier run finished."""
        assert config.data is not None, "SelectConfig requires data for a pass over it"
        windows_NS = windows(config.data, self.source.dims)
        compute = chosen_compute(TextPass(config.data, config.batch_tokens, config.device, config.dtype), ranks)
        text = hashlib.sha256(windows_NS.tobytes()).hexdigest()
        identity = [
            compute_facts(compute, ranks),
            data_facts(windows_NS),
            text,
            selectors.dump(self.selector),
            {layer: found.tolist() for layer, found in self.candidates.items()},
        ]
        job = Job(ranks, Resume(working, identity, ranks, config.memory_budget))
        found = self._layers(ranks.share(windows_NS, compute.batch), compute, job)
        job.resume.remove()
        return found

    def _layers(self, windows_NS: np.ndarray, compute: Compute, job: Job) -> dict[int, np.ndarray]:
        resume = job.resume
        found = {layer: resume.sums(layer)["neurons"].astype(int) for layer in self.source.layers if layer < resume.start}
        at: dict[int, Sums] = {}
        states = StreamedModel(self.source, self.reader, compute).run(windows_NS, _Equations(self, at), resume.place, resume.start)
        layers = self.source.dims.layers
        for hidden in progress(states, "select", "layer", layers, done=resume.start, each=True, reached=lambda hidden: hidden.layer):
            require_finite(hidden, self.source)
            done = hidden.layer - 1
            if done < resume.start:
                continue
            stats = None
            if done in at:
                sums = at.pop(done).over(job.ranks)
                places_F = self.selector.choose(sums, self.width, self.free).cpu().numpy()
                found[done] = self.candidates[done][places_F]
                stats = LayerStats({"tokens": np.array([float(sums.tokens)]), "neurons": found[done].astype(float)})
            resume.finish_layer(done, stats, hidden)
        return found

    @property
    def free(self) -> int:
        """Columns beside the neurons: a constant where experts have a down bias."""
        return int(self.source.stock.moe[self.source.layers[0]].experts.down_bias is not None)


class _Equations(Observer):
    """Adds up the normal equations of the candidates' activations and of what the routed experts gave, by layer."""

    def __init__(self, job: _Pass, at: dict[int, Sums]):
        super().__init__(job.source, ())
        self._job, self._at = job, at

    def routed(self, layer: int, x_TD: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
        """Of one batch."""
        y_TD, free = super().routed(layer, x_TD, routing, experts), self._job.free
        chosen = self._job.candidates[layer]
        candidates_C, width = torch.from_numpy(chosen).to(x_TD.device), self._job.source.dims.expert_width
        h_TC = experts.activations(x_TD, candidates_C // width, candidates_C % width)
        if free:
            h_TC = torch.cat((h_TC, h_TC.new_ones(len(h_TC), 1)), dim=1)
        if layer not in self._at:
            self._at[layer] = Sums.zeros(len(chosen) + free, x_TD.shape[1], x_TD.device)
        self._at[layer].add(h_TC, y_TD)
        return y_TD


def _plan(config: SelectConfig, source: MoeSource, chosen: dict[int, tuple[LayerStats, np.ndarray]], groups: int) -> ConversionPlan:
    """Down columns keep their size times the mean routing weight of a token over so many experts as the neurons make, as with `uniform`."""
    width = source.dims.expert_width
    layers = [
        NeuronPlan(
            layer=layer,
            experts=tuple((neurons_F // width).tolist()),
            neurons=tuple((neurons_F % width).tolist()),
            scale=float(stats["gate_sum"].sum() / stats.tokens / (len(neurons_F) / width)),
            shared_scale=shared_scale(stats),
            input_scale=input_scale(stats),
        )
        for layer, (stats, neurons_F) in chosen.items()
    ]
    origin = {"path": str(source.index.directory), "fingerprint": source.fingerprint, **source.factor_facts()}
    methods: dict[str, Any] = {"score": None, "group": None, "scale": None, "select": selectors.dump(config.select)}
    return ConversionPlan(origin, source.family, groups, groups, layers=tuple(layers), **methods)


def dry_run(config: SelectConfig) -> dict[str, Any]:
    """What would be read and written (bytes), the FLOPs beyond the teacher's pass, and the memory (bytes)."""
    source, _, groups = _inputs(config)
    dims = source.dims
    width = room(source, groups)
    candidates = min(config.select.candidates(width), dims.experts * dims.expert_width)
    facts: dict[str, Any] = {
        "source": source.facts(),
        "neurons": {"of a layer": dims.experts * dims.expert_width, "candidates": candidates, "chosen": width},
        "padding": dataclasses.asdict(padding(source, groups, width)),
        "reads": {str(source.index.directory): source.index.nbytes},
        "writes": {config.output: len(source.layers) * width * 12},
    }
    if config.data is None:
        return facts
    tokens = windows(config.data, dims).size
    per_layer = {
        "flops of a layer's sums": 2 * tokens * candidates * (candidates + 3 * dims.hidden_size),
        "flops of a layer's choice": 2 * width * candidates * (dims.hidden_size + width // 2),
        "bytes of a layer's choice": 8 * (width // getattr(config.select, "block", 1)) * candidates * (2 * dims.hidden_size + width // 2),
    }
    memory = 8 * candidates * (2 * candidates + 2 * dims.hidden_size + width)
    return {**facts, "tokens": tokens, **per_layer, "memory_bytes": {"sums and factor of one layer": memory}}
