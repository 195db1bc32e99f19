"""Orthogonal least squares: neurons that together read out the routed experts' output best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_moe2dense.common.config import key
from megatron_moe2dense.surgery.neurons import NeuronSelector, selectors

if TYPE_CHECKING:
    import torch

    from megatron_moe2dense.surgery.refit.normal import Sums


@selectors.register("ols")
class OrthogonalLeastSquares(NeuronSelector):
    """Forward selection: each neuron is the one that, with the down columns of all chosen ones refitted, takes most off the squared
    error (ours as a way to choose neurons). About F C (D + F / 2) multiplications for C candidates and hidden size D."""

    prefilter: float = key(4.0, "candidates, by energy, as a multiple of the dense FFN's width F", "times F", ge=1)
    block: int = key(1, "neurons chosen between two passes over all candidates; 1 is exact, more is faster", "neurons", gt=0)
    ridge: float = key(1e-6, "relative to the mean of the diagonal", gt=0)

    def candidates(self, width: int) -> int:
        """A multiple of the width."""
        return math.ceil(self.prefilter * width)

    def choose(self, sums: Sums, width: int, free: int) -> torch.Tensor:
        """The greedy set in the order of choice; where fewer neurons span all the others, the ranking's first follow."""
        import torch

        from megatron_moe2dense.surgery.refit.forward import ForwardSelection

        selection = ForwardSelection(sums, width, self.ridge, free)
        while (missing := width - len(selection.chosen)) and selection.choose(min(self.block, missing)):
            pass
        return torch.cat((selection.chosen, selection.rest(missing)))
