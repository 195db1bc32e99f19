"""What a router decided, as its stock block hands it to the experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """experts_TA: the selected experts. gates_TA: the weights that multiply their outputs. probs_TE: scores of all experts.
    factor: what the block multiplies the sum of the weighed outputs by."""

    experts_TA: torch.Tensor
    gates_TA: torch.Tensor
    probs_TE: torch.Tensor
    factor: float = 1.0

    @property
    def weights_TA(self) -> torch.Tensor:
        """With which the selected experts' outputs enter the block's output, float64."""
        return self.gates_TA.double() * self.factor

    def split(self, tokens: int) -> list[Routing]:
        """Of chunks of so many tokens."""
        parts = zip(self.experts_TA.split(tokens), self.gates_TA.split(tokens), self.probs_TE.split(tokens), strict=True)
        return [Routing(*part, self.factor) for part in parts]
