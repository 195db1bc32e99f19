"""One layer's refit: sums over the batches that pass, then the solved down projection with what it is worth on held-out text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron_moe2dense.common.log import logger
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.families.ffn import Ffn, Gating
from megatron_moe2dense.surgery.dense_block import neurons
from megatron_moe2dense.surgery.refit.normal import Solution, Sums, best_ridge, solve

RIDGES = tuple(10.0**power for power in range(-7, 0))


@dataclass(frozen=True)
class FitReport:
    """Errors are relative: sum ||target - output||^2 / sum ||target||^2.

    Attributes:
        ridge: relative to the mean of the diagonal. tokens, unknowns: fitted on, and weights of one output channel.
        before: of the plan's own down projection on held-out text. train, held_out: of the fit on the other nine tenths of the text, there
            and on held-out text.
        reconstructed, epochs: held-out error after the passes over the text that were kept; of 0 passes it is `held_out`.
    """

    layer: int
    ridge: float
    tokens: int
    unknowns: int
    before: float
    train: float
    held_out: float
    reconstructed: float | None = None
    epochs: int = 0

    @property
    def overfits(self) -> bool:
        """Whether the fit is worth much less, or nothing, on text it has not seen."""
        return self.held_out > min(self.before, max(1.25 * self.train, self.train + 0.02))

    def log(self) -> None:
        """One line, and a warning where it overfits."""
        said = f"layer {self.layer}: ridge {self.ridge:.0e}, error {self.before:.4f} -> {self.held_out:.4f} (train {self.train:.4f})"
        logger.info("%s%s", said, "" if self.reconstructed is None else f", reconstructed {self.reconstructed:.4f}")
        if self.overfits:
            hint = f"{self.tokens} tokens for {self.unknowns} weights an output; use more data.sequences, or refit.ridge=auto"
            logger.warning("layer %d: the refit does not carry over to held-out text: %s", self.layer, hint)

    def facts(self) -> dict[str, Any]:
        """For refit.json."""
        return asdict(self) | {"overfits": self.overfits}


@dataclass(frozen=True)
class LayerFit:
    """tensors: those of the Ffn that are others now, by its names, in the dtype of the source."""

    tensors: dict[str, torch.Tensor]
    report: FitReport

    def applied(self, ffn: Ffn) -> Ffn:
        """The FFN with them."""
        return replace(ffn, **self.tensors)


class LayerSums:
    """Normal equations of one layer.

    Args:
        ffn: the dense FFN on the compute device, in its type. fixed: the last so many neurons keep their down columns.
    """

    def __init__(self, gating: Gating, ffn: Ffn, fixed: int):
        self._gating, self._ffn, self._fixed = gating, ffn, fixed
        self._free = int(ffn.down_bias_D is not None)
        self._width = len(ffn.up_FD) - fixed
        sizes = self._width + self._free, len(ffn.down_DF), ffn.up_FD.device
        self.train, self.held_out = Sums.zeros(*sizes), Sums.zeros(*sizes)

    def add(self, x_BSD: torch.Tensor, target_BSD: torch.Tensor, held_out_B: torch.Tensor) -> torch.Tensor:
        """Inputs of the FFN and wanted outputs of some windows; held_out_B: which of them only judge. Returns, in float64, what is wanted
        of the neurons that are solved."""
        h_BSF, target_BSD = neurons(self._gating, self._ffn, x_BSD).double(), target_BSD.double()
        if self._fixed:
            target_BSD = target_BSD - h_BSF[..., self._width :] @ self._ffn.down_DF[:, self._width :].double().T
        h_BSF = h_BSF[..., : self._width]
        if self._free:
            h_BSF = torch.cat((h_BSF, h_BSF.new_ones(*h_BSF.shape[:-1], 1)), dim=-1)
        for sums, chosen_B in ((self.train, ~held_out_B), (self.held_out, held_out_B)):
            if chosen_B.any():
                sums.add(h_BSF[chosen_B].flatten(0, 1), target_BSD[chosen_B].flatten(0, 1))
        return target_BSD

    def over(self, ranks: Ranks) -> LayerSums:
        """With the sums over the tokens of all ranks."""
        self.train, self.held_out = self.train.over(ranks), self.held_out.over(ranks)
        return self

    def fit(self, layer: int, ridge: float | None, dtype: torch.dtype) -> tuple[LayerFit, LayerFit]:
        """Solve on all text, and without the held-out tenth, where the errors of the report come from.

        Args:
            ridge: None: the best of RIDGES on the held-out text. dtype: of the source.
        """
        wanted = best_ridge(self.train, self.held_out, RIDGES, self._free) if ridge is None else ridge
        judged, whole = solve(self.train, wanted, self._free), solve(self.train + self.held_out, wanted, self._free)
        if whole.ridge > wanted:
            logger.warning("layer %d: ill-conditioned with a ridge of %.0e; solved with %.0e", layer, wanted, whole.ridge)
        before_FD = self._ffn.down_DF[:, : self._width].double().T
        if self._ffn.down_bias_D is not None:
            before_FD = torch.cat((before_FD, self._ffn.down_bias_D.double()[None]))
        report = FitReport(
            layer=layer,
            ridge=whole.ridge,
            tokens=self.train.tokens + self.held_out.tokens,
            unknowns=self._width + self._free,
            before=self.held_out.error(before_FD),
            train=self.train.error(judged.solution_FD),
            held_out=self.held_out.error(judged.solution_FD),
        )
        return LayerFit(self._tensors(whole, dtype), report), LayerFit(self._tensors(judged, dtype), report)

    def _tensors(self, solution: Solution, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        solved_DF, kept_DF = solution.solution_FD[: self._width].T, self._ffn.down_DF[:, self._width :].double()
        tensors = {"down_DF": torch.cat((solved_DF, kept_DF), dim=1)}
        if self._free:
            tensors["down_bias_D"] = solution.solution_FD[self._width]
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}
