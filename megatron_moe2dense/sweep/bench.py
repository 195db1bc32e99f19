"""Dense models made by plans, evaluated in memory against the MoE: nothing dense is written but the layers of a refit, for as long as it
takes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals.perplexity import Measured
from megatron_moe2dense.surgery.dense_stream import DenseModel, DenseStream, Head
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.refit.planned import Place, fit_planned
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute
from megatron_moe2dense.sweep.against_teacher import against_teacher


@dataclass(frozen=True)
class Bench:
    """The opened MoE and held-out text.

    Attributes:
        teacher_NSD: the MoE's final hidden states, read once. refits: folder of the layers that refits solve; a killed run goes on from
            them. memory_budget: bytes of a refit's hidden states in memory.
    """

    source: MoeSource
    reader: CheckpointReader
    stream: DenseStream
    head: Head
    windows_NS: np.ndarray
    teacher_NSD: torch.Tensor
    refits: Path
    memory_budget: int

    @classmethod
    def open(cls, reader: CheckpointReader, source: MoeSource, compute: Compute, windows_NS: np.ndarray, place: Place) -> Bench:
        """Runs the MoE over the text."""
        stream = DenseStream(source, reader, compute)
        head, teacher_NSD = stream.head(), stream.teacher_states(windows_NS)
        return cls(source, reader, stream, head, windows_NS, teacher_NSD, place.directory, place.memory_budget)

    def every(self, step: int) -> Bench:
        """With every `step`th window of the text."""
        return replace(self, windows_NS=self.windows_NS[::step], teacher_NSD=self.teacher_NSD[::step])

    def evaluate(self, plans: Sequence[ConversionPlan]) -> tuple[Measured, list[Measured]]:
        """The teacher's and the dense models' sums, all in one pass."""
        todo = [plan for plan in plans if plan.refit is not None]
        places = [Place(self._folder(plan), self.memory_budget, Ranks()) for plan in todo]
        for place in places:
            place.directory.mkdir(parents=True, exist_ok=True)
        fits = fit_planned(self.source, self.reader, list(zip(todo, places, strict=True)))
        by_hash = {plan.hash(): found for plan, found in zip(todo, fits, strict=True)}
        models = [DenseModel(plan.layers, by_hash.get(plan.hash())) for plan in plans]
        return against_teacher(self.head, self.windows_NS, self.teacher_NSD, self.stream.dense_states(self.windows_NS, models))

    def forget(self, plans: Sequence[ConversionPlan]) -> None:
        """Drop what their refits solved."""
        for plan in plans:
            if plan.refit is not None:
                shutil.rmtree(self._folder(plan))

    def _folder(self, plan: ConversionPlan) -> Path:
        return self.refits / plan.hash()
