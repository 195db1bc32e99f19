"""Calibration text through the teacher, and in sequential mode beside it through the student made so far: the refit of every layer.

parallel: inputs and targets are those of the teacher's own MoE block. sequential: layers in order, inputs from the already converted
student, target = the teacher's residual stream after the layer minus the student's before its FFN, so later layers mend earlier ones.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.families.ffn import Ffn, Gating
from megatron_moe2dense.surgery.calibrate import require_finite
from megatron_moe2dense.surgery.config import RefitConfig
from megatron_moe2dense.surgery.dense_block import mapped, placed
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.layout import seam_ffn
from megatron_moe2dense.surgery.observe import Observer
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.refit.layer import FitReport, LayerFit, LayerSums
from megatron_moe2dense.surgery.refit.reconstruct import LayerText, Reconstruction
from megatron_moe2dense.surgery.refit.store import FittedLayers
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute, StreamedModel

_TRIED, _NEAR = 8, 0.02  # tokens of the trial; relative error of a bfloat16 sum, far below any factor or norm


def held_out(windows: int) -> torch.Tensor:
    """Which windows judge and are not fitted on: every tenth, the last one of fewer; none of a single one."""
    chosen = torch.arange(windows) % 10 == 9
    if windows > 1 and not chosen.any():
        chosen[-1] = True
    return chosen


@torch.no_grad()
def parallel(refits: Sequence[Refit]) -> None:
    """Every layer from the teacher's own inputs and outputs; one pass for all refits, which have text and compute in common."""
    first = refits[0]
    at: dict[int, list[_Layer]] = {}
    states = StreamedModel(first.source, first.reader, first.compute).run(first.share[0], _Inputs(refits, at), first.place("teacher"))
    for hidden in progress(states, "refit", "layer", first.source.dims.layers, each=True, reached=lambda hidden: hidden.layer):
        require_finite(hidden, first.source)
        hidden.forget_others()
        done = [begun.finish() for begun in at.pop(hidden.layer - 1, [])]
        _say([report for report in done if report is not None])


class _Inputs(Observer):
    """Hands what goes into the MoE blocks, and comes out of them, to the refits of each layer."""

    def __init__(self, refits: Sequence[Refit], at: dict[int, list[_Layer]]):
        super().__init__(refits[0].source, ())
        self._refits, self._at, self._batches = refits, at, Counter[int]()

    def passed(self, layer: int, x_TD: torch.Tensor, y_TD: torch.Tensor) -> None:
        """Of one batch."""
        if layer not in self._at:
            self._at[layer] = [refit.begun(layer, len(self._refits)) for refit in self._refits if layer not in refit.fits]
        shape = -1, self._refits[0].windows_NS.shape[1], x_TD.shape[1]
        for begun in self._at[layer]:
            begun.add(self._batches[layer], x_TD.view(shape), y_TD.view(shape))
        self._batches[layer] += 1


def _say(reports: Sequence[FitReport]) -> None:
    """A line a layer, whether it was solved for one dense model or for many."""
    if len(reports) == 1:
        reports[0].log()
    elif reports:
        before, after = (statistics.median(getattr(report, name) for report in reports) for name in ("before", "held_out"))
        logger.info("layer %d: %d refits, median error %.4f -> %.4f", reports[0].layer, len(reports), before, after)


@dataclass(frozen=True)
class Refit:
    """A refit to do: `parallel([refit, ...])` or `refit.sequential()`.

    Attributes:
        plan: of the whole model. windows_NS: calibration text of all ranks. fits: where layers go, rank 0 puts them there.
        memory_budget: bytes of hidden states of a rank in memory, beyond which they live in files.
    """

    source: MoeSource
    reader: CheckpointReader
    plan: ConversionPlan
    windows_NS: np.ndarray
    compute: Compute
    config: RefitConfig
    fits: FittedLayers
    memory_budget: int
    ranks: Ranks

    @torch.no_grad()
    def sequential(self) -> None:
        """Layer after layer, each from what the student's layers before it really give."""
        teacher = StreamedModel(self.source, self.reader, self.compute).run(self.share[0], Observer(self.source, ()), self.place("teacher"))
        student = _Student(self.source, self.reader, self.compute)
        student.begin(self.share[0], self.place("student"))
        next(teacher)
        for wanted in progress(teacher, "refit", "layer", self.source.dims.layers, each=True):
            require_finite(wanted, self.source)
            wanted.forget_others()
            layer = wanted.layer - 1
            if layer not in self.source.layers:
                student.advance(layer, None)
                continue
            if layer not in self.fits:
                begun = self.begun(layer)
                for i, (x_BSD, residual_BSD) in enumerate(student.before_ffn(layer)):
                    begun.add(i, x_BSD, wanted[i].to(residual_BSD.device).double() - residual_BSD.double())
                report = begun.finish()
                _say([report] if report is not None else [])
            student.advance(layer, self.placed(self.fits[layer].applied(self.planned(layer))))

    def planned(self, layer: int) -> Ffn:
        """A layer's dense FFN without the refit."""
        plan = next(plan for plan in self.plan.layers if plan.layer == layer)
        return seam_ffn(self.source, self.source.reader(self.reader), layer, plan)

    def begun(self, layer: int, together: int = 1) -> _Layer:
        """Nothing added yet. together: how many refits share the memory."""
        ffn = self.planned(layer)
        routed = self.plan.neurons or self.plan.groups * self.source.dims.expert_width
        fixed = len(ffn.up_FD) - routed if self.config.shared == "fixed" else 0
        text = self._layer_text(together) if self.config.reconstruct is not None else None
        return _Layer(self, layer, fixed, ffn, LayerSums(self.gating, self.placed(ffn), fixed), text)

    def _layer_text(self, together: int) -> LayerText:
        shape = *self.share[0].shape, self.source.dims.hidden_size
        inputs, targets = (
            HiddenStates(shape, dtype, self.compute.batch, self.place(name, dtype, together))
            for name, dtype in (("inputs", self.compute.dtype), ("targets", torch.float32))
        )
        return LayerText(inputs, targets, self.share[1])

    def placed(self, ffn: Ffn) -> Ffn:
        """On the compute device, in its type."""
        return placed(ffn, torch.empty(0, dtype=self.compute.dtype, device=self.compute.device))

    @cached_property
    def gating(self) -> Gating:
        """The source's."""
        return self.source.gating()

    @cached_property
    def share(self) -> tuple[np.ndarray, torch.Tensor]:
        """This rank's windows, and which of them are held out."""
        own_N = self.ranks.share(np.arange(len(self.windows_NS)), self.compute.batch)
        return self.windows_NS[own_N], held_out(len(self.windows_NS))[torch.from_numpy(own_N)]

    def held_out(self, batch: int) -> torch.Tensor:
        """Which windows of a batch of this rank's are."""
        start = batch * self.compute.batch
        return self.share[1][start : start + self.compute.batch].to(self.compute.device)

    def place(self, name: str, dtype: torch.dtype | None = None, together: int = 1) -> HiddenPlace:
        """Where hidden states live. dtype: None: the compute type."""
        name, budget = f"{name}-{self.ranks.rank:04d}", self.memory_budget // together
        nbytes = self.share[0].size * self.source.dims.hidden_size * (dtype or self.compute.dtype).itemsize
        return HiddenPlace(self.fits.folder, budget, name) if nbytes > budget else HiddenPlace()


@dataclass(frozen=True)
class _Layer:
    """A layer in the making. fixed: how many of its last neurons stay. ffn: as planned. text: for a reconstruction."""

    refit: Refit
    number: int
    fixed: int
    ffn: Ffn
    sums: LayerSums
    text: LayerText | None

    def add(self, batch: int, x_BSD: torch.Tensor, target_BSD: torch.Tensor) -> None:
        wanted_BSD = self.sums.add(x_BSD, target_BSD, self.refit.held_out(batch))
        if self.text is not None:
            self.text.put(batch, x_BSD, wanted_BSD)

    def finish(self) -> FitReport | None:
        """Solve the layer from the sums of all ranks, and keep it; what it is worth, on rank 0."""
        refit, report = self.refit, None
        sums, first = self.sums.over(refit.ranks), refit.ranks.rank == 0
        if first or self.text is not None:
            ridge = None if refit.config.ridge == "auto" else refit.config.ridge
            fit = self._reconstructed(*sums.fit(self.number, ridge, self.ffn.up_FD.dtype))
            if first:
                refit.fits.put(fit)
                report = fit.report
        refit.ranks.wait()
        return report

    def _reconstructed(self, whole: LayerFit, judged: LayerFit) -> LayerFit:
        settings, refit = self.refit.config.reconstruct, self.refit
        if settings is None or self.text is None:
            return whole
        self.text.complete()
        ffn = mapped(self.ffn, lambda tensor: tensor.to(refit.compute.device).float())
        found = Reconstruction(refit.gating, ffn, self.fixed, settings, refit.ranks).train(judged, self.text, self.number)
        return found or replace(whole, report=replace(whole.report, reconstructed=whole.report.held_out))


class _Tap:
    """In the place of the MoE block, or of its experts: keeps its input and gives nothing, or `value`."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return torch.zeros_like(x) if self.value is None else self.value.view_as(x)


def adds_plainly(source: MoeSource, reader: CheckpointReader, compute: Compute, windows_NS: np.ndarray) -> bool:
    """Whether a layer adds to the residual stream just what a dense FFN gives, so that a refit in sequential mode can tell from the stream
    what is missing: no norm, factor or projection behind it. One layer is tried, on a few tokens.

    Raises:
        UserError: layers that hand more to each other than hidden states.
    """
    student = _Student(source, reader, compute)
    student.begin(windows_NS[:1, :_TRIED], HiddenPlace())
    return student.adds_plainly(source.layers[0])


class _Student(StreamedModel):
    """The dense model in the making."""

    def begin(self, windows_NS: np.ndarray, place: HiddenPlace) -> None:
        """The states before layer 0."""
        self._hidden, self._calls = self._embed(windows_NS, place, 0)

    def before_ffn(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batch by batch the input of the FFN, and the residual stream its output is added to, [B, S, D] each."""
        tap = _Tap()
        self._assemble_with(layer, tap)
        for i, x_BSD in enumerate(self._hidden):
            residual_BSD = self._forward(layer, i, x_BSD)
            assert tap.x is not None, "every stock layer calls its MLP"
            yield tap.x.reshape(*residual_BSD.shape[:2], -1), residual_BSD
        self._release(layer)

    def adds_plainly(self, layer: int) -> bool:
        """See the function of that name."""
        tap = _Tap()
        self._assemble_with(layer, tap)
        x_BSD = next(iter(self._hidden))
        without = self._forward(layer, 0, x_BSD)
        assert tap.x is not None, "every stock layer calls its MLP"
        tap.value = torch.randn(tap.x.shape, generator=torch.Generator().manual_seed(0)).to(tap.x)
        added = self._forward(layer, 0, x_BSD) - without
        self._release(layer)
        same = added.numel() == tap.value.numel()
        return same and bool((added - tap.value.view_as(added)).norm() <= _NEAR * tap.value.norm())

    def advance(self, layer: int, ffn: Ffn | None) -> None:
        """The states after the layer; ffn: None for a layer without experts."""
        block = None
        if ffn is not None:
            block = self._dense_block(layer)
            block.ffn = ffn
        self._assemble_with(layer, block)
        for i, x_BSD in enumerate(self._hidden):
            self._hidden.put(i, self._forward(layer, i, x_BSD))
        self._release(layer)
        self._hidden.advance(layer + 1)
        self._hidden.forget_others()

    def _forward(self, layer: int, batch: int, x_BSD: torch.Tensor) -> torch.Tensor:
        return self._calls[batch][layer].run(self._layers[layer], x_BSD.to(self._compute.device))
