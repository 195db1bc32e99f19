"""Forward selection of regressors from normal equations by orthogonal least squares, in float64 (Chen, Billings and Luo 1989).

The factor is an incremental Cholesky factorisation over all candidates; choosing in blocks of P makes its updates matrix products (ours).
Letters: C candidates and free columns, K taken so far, P taken at once, M a shortlist, D outputs.
"""

from __future__ import annotations

import torch

from megatron_moe2dense.surgery.refit.normal import Sums

_SHORTLIST = 8  # times a block: the candidates among which it is chosen exactly
_LEAST = 1e-10  # share of its own square that is left of a candidate that adds nothing new


class ForwardSelection:
    """Each choice takes most off sum ||y - W^T h||^2 + ridge m ||W||^2 over the weights of all chosen.

    Args:
        sums: of the candidates, and of `free` columns behind them that are always there. most: how many will be chosen.
        ridge: relative to the mean m of the candidates' diagonal.
    """

    def __init__(self, sums: Sums, most: int, ridge: float, free: int):
        self._gram_CC, self._residual_CD = sums.gram_FF.clone(), sums.cross_FD.clone()
        count = len(self._gram_CC) - free
        diagonal_C = self._gram_CC.diagonal()
        self._least_C = _LEAST * diagonal_C
        diagonal_C[:count] += ridge * diagonal_C[:count].mean()
        self._left_C = diagonal_C.clone()
        self._rows_KC = self._gram_CC.new_zeros(most + free, len(self._gram_CC))
        self._taken, self.chosen = 0, torch.empty(0, dtype=torch.long, device=self._gram_CC.device)
        if free and sums.tokens:
            self._take(torch.arange(count, count + free, device=self.chosen.device))
        self._open_C = torch.arange(count + free, device=self.chosen.device) < count

    def choose(self, block: int) -> bool:
        """The next `block` choices, or fewer; False when no candidate takes anything off."""
        gain_C = self._gain()
        picks_P = gain_C.argmax()[None]
        if block > 1:
            short_M = gain_C.topk(min(_SHORTLIST * block, len(gain_C))).indices
            picks_P = short_M[self._greedy(short_M, block)]
        picks_P = picks_P[gain_C[picks_P] > 0]
        self._take(picks_P)
        self._open_C[picks_P] = False
        self.chosen = torch.cat((self.chosen, picks_P))
        return len(picks_P) > 0

    def rest(self, count: int) -> torch.Tensor:
        """The first `count` candidates that are not chosen."""
        return self._open_C.nonzero()[:count, 0]

    def _gain(self) -> torch.Tensor:
        usable_C = self._open_C & (self._left_C > self._least_C)
        return (self._residual_CD.square().sum(1) / self._left_C.where(usable_C, torch.inf)).nan_to_num_(0.0)

    def _take(self, picks_P: torch.Tensor) -> None:
        """What the picks explain goes from all candidates and from the outputs."""
        end = self._taken + len(picks_P)
        rows_PC = self._gram_CC[picks_P] - self._rows_KC[: self._taken, picks_P].T @ self._rows_KC[: self._taken]
        factor_PP = torch.linalg.cholesky(rows_PC[:, picks_P])
        rows_PC = torch.linalg.solve_triangular(factor_PP, rows_PC, upper=False)
        explained_PD = torch.linalg.solve_triangular(factor_PP, self._residual_CD[picks_P], upper=False)
        self._residual_CD.addmm_(rows_PC.T, explained_PD, alpha=-1)
        self._left_C -= rows_PC.square().sum(0)
        self._rows_KC[self._taken : end], self._taken = rows_PC, end

    def _greedy(self, short_M: torch.Tensor, size: int) -> torch.Tensor:
        """`size` of a shortlist, each the best after those before it, as places in the list."""
        rows_KM = self._rows_KC[: self._taken, short_M]
        gram_MM = self._gram_CC[short_M][:, short_M] - rows_KM.T @ rows_KM
        cross_MM = self._residual_CD[short_M] @ self._residual_CD[short_M].T
        open_M, chosen = self._open_C[short_M], []
        for _ in range(size):
            left_M = gram_MM.diagonal()
            gain_M = (cross_MM.diagonal() / left_M.where(open_M & (left_M > self._least_C[short_M]), torch.inf)).nan_to_num_(0.0)
            best = int(gain_M.argmax())
            if gain_M[best] <= 0:
                break
            row_M, toward_M = gram_MM[best] / left_M[best].sqrt(), cross_MM[best] / left_M[best].sqrt()
            both_MM = torch.outer(row_M, toward_M - row_M * (cross_MM[best, best] / left_M[best]) / 2)
            cross_MM, gram_MM = cross_MM - both_MM - both_MM.T, gram_MM - torch.outer(row_M, row_M)
            open_M[best] = False
            chosen.append(best)
        return torch.tensor(chosen, dtype=torch.long, device=short_M.device)
