"""D-optimal selection (paper): a greedy set of experts whose weighted outputs span the largest volume."""

from __future__ import annotations

import numpy as np
from pydantic import field_validator

from megatron_moe2dense.common.config import key
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer, Scorer, Selection, check_keep


@scorers.register("d_optimal")
class DOptimal(Scorer):
    """Greedy maximum of log det(M_S + lambda Id), M_ij = sqrt(I_i I_j) gram_ij / tokens, for a chosen importance I.

    lambda = mean(diag M) / K (ours). log det(Id + M_S / lambda) is monotone submodular, so the greedy set is within 1 - 1/e
    of the best. Scores are the importances.
    """

    importance: str = key("acp", "id of the pointwise score that weighs the experts")

    @field_validator("importance")
    @classmethod
    def _pointwise(cls, value: str) -> str:
        if not issubclass(scorers[value], PointwiseScorer):
            known = [name for name in scorers if issubclass(scorers[name], PointwiseScorer)]
            raise ValueError(f"{value!r} is a set method; one of {', '.join(known)} is needed")
        return value

    def _importance(self) -> PointwiseScorer:
        method = scorers[self.importance]()
        assert isinstance(method, PointwiseScorer)
        return method

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return tuple(dict.fromkeys((*self._importance().needs(), "gram")))

    def select(self, stats: LayerStats, keep: int) -> Selection:
        """The greedy set, in the order of choice."""
        scores_E = self._importance().scores(stats)
        check_keep(keep, len(scores_E))
        root_E = np.sqrt(scores_E)
        m_EE = root_E[:, None] * stats["gram"] * root_E / stats.tokens
        return Selection(greedy_log_det(m_EE, keep), scores_E)


@scorers.register("do_acp")
class DoAcp(Scorer):
    """D-optimal selection on ACP (paper): the preset `{method: d_optimal, importance: acp}`."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return DOptimal(importance="acp").needs()

    def select(self, stats: LayerStats, keep: int) -> Selection:
        """The greedy set, in the order of choice."""
        return DOptimal(importance="acp").select(stats, keep)


def greedy_log_det(m_EE: np.ndarray, keep: int) -> np.ndarray:
    """`keep` indices that greedily maximise log det(M_S + lambda Id), lambda = mean(diag M) / keep; O(E keep^2).

    Keeps the rows of an incremental Cholesky factor; the gain of a candidate is the log of its residual variance. Ties go to
    the lower index.
    """
    ridge = np.diag(m_EE).mean() / keep
    residual_E = np.diag(m_EE) + ridge
    rows_KE = np.zeros((keep, len(m_EE)))
    chosen: list[int] = []
    for step in range(keep):
        best = int(np.argmax(residual_E))
        if residual_E[best] > 0:  # 0 only when M is 0: then every set is as good and the lowest numbers win
            rows_KE[step] = (m_EE[best] - rows_KE[:step, best] @ rows_KE[:step]) / np.sqrt(residual_E[best])
        residual_E = residual_E - rows_KE[step] ** 2
        chosen.append(best)
        residual_E[chosen] = -np.inf
    return np.array(chosen)
