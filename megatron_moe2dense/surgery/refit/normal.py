"""Ridge regression from streamed normal equations, in float64: F x F and F x D sums, never a tokens x F matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_moe2dense.compute.ranks import Ranks

_LARGEST_CONDITION = 1e13  # of the regularised matrix, estimated; float64 then keeps three digits of the solution


@dataclass
class Sums:
    """Sums over tokens t of h h^T [F, F], h y^T [F, D], ||y||^2 and 1, float64."""

    gram_FF: torch.Tensor
    cross_FD: torch.Tensor
    square: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, outputs: int, device: torch.device) -> Sums:
        """Nothing added yet."""
        like = torch.zeros((), dtype=torch.float64, device=device)
        return cls(like.new_zeros(width, width), like.new_zeros(width, outputs), like.new_zeros(()))

    def add(self, h_TF: torch.Tensor, y_TD: torch.Tensor) -> None:
        """Some tokens more."""
        h_TF, y_TD = h_TF.double(), y_TD.double()
        self.gram_FF.addmm_(h_TF.T, h_TF)
        self.cross_FD.addmm_(h_TF.T, y_TD)
        self.square += y_TD.square().sum()
        self.tokens += len(h_TF)

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram_FF + other.gram_FF, self.cross_FD + other.cross_FD, self.square + other.square, self.tokens + other.tokens)

    def over(self, ranks: Ranks) -> Sums:
        """The sums over the tokens of all ranks."""
        if ranks.world == 1:
            return self
        own = {"tokens": np.array([float(self.tokens)]), "square": self.square.cpu().numpy()[None]}
        whole = ranks.sum({**own, "gram": self.gram_FF.cpu().numpy(), "cross": self.cross_FD.cpu().numpy()})
        gram_FF, cross_FD = (torch.from_numpy(whole[name]).to(self.gram_FF) for name in ("gram", "cross"))
        return Sums(gram_FF, cross_FD, gram_FF.new_tensor(float(whole["square"][0])), int(whole["tokens"][0]))

    def error(self, solution_FD: torch.Tensor) -> float:
        """sum ||y - W^T h||^2 over sum ||y||^2 of these tokens; 0 where all y are 0."""
        fitted = (solution_FD * self.cross_FD).sum() * 2 - (solution_FD * (self.gram_FF @ solution_FD)).sum()
        return float((self.square - fitted).clamp_min(0) / self.square) if self.square > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """solution_FD: float64. ridge: the one it was solved with, larger than the one asked for where the problem was ill-conditioned."""

    solution_FD: torch.Tensor
    ridge: float


def solve(sums: Sums, ridge: float, free: int = 0) -> Solution:
    """Minimise sum ||y - W^T h||^2 + ridge m ||W||^2, m the mean of the diagonal of sum h h^T.

    An ill-conditioned problem (a failed Cholesky factorisation, or a condition above 1e13 by its diagonal) is solved with a ridge ten times
    as large, as often as it takes. Neurons that are always 0 get 0.

    Args:
        free: the last so many rows of W (a bias) that the ridge leaves alone.
    """
    width = len(sums.gram_FF) - free
    diagonal_F = sums.gram_FF.diagonal()
    mean = float(diagonal_F[:width].mean())
    if mean == 0.0:  # no neuron is ever active: the bias alone, if there is one
        solution_FD = torch.zeros_like(sums.cross_FD)
        solution_FD[width:] = sums.cross_FD[width:] / max(sums.tokens, 1)
        return Solution(solution_FD, ridge)
    while True:
        regular_FF = sums.gram_FF.clone()
        regular_FF.diagonal()[:width] += ridge * mean
        factor_FF, failed = torch.linalg.cholesky_ex(regular_FF)
        pivots_F = factor_FF.diagonal()
        if not failed and float((pivots_F.max() / pivots_F.min()) ** 2) < _LARGEST_CONDITION:
            return Solution(torch.cholesky_solve(sums.cross_FD, factor_FF), ridge)
        ridge = max(10 * ridge, 1e-14)


def best_ridge(train: Sums, held_out: Sums, ridges: Sequence[float], free: int = 0) -> float:
    """The ridge whose solution on `train` has the least error on `held_out`; of equal ones the largest."""
    errors = [(held_out.error(solve(train, ridge, free).solution_FD), -ridge) for ridge in ridges]
    return -min(errors)[1]
