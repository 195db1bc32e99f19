"""Scoring methods (docs/method.md#scores-and-selection), found by name (`score: {method: NAME}`): statistics of a layer's experts in, the
kept ones out. numpy only.

A score of each expert on its own, without options, is a function under `@pointwise`; any other method is a class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from pydantic import field_validator

from megatron_moe2dense.common.config import key
from megatron_moe2dense.common.registry import Registry
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer, Scorer, Selection, check_keep

Score = Callable[[LayerStats], np.ndarray]

scorers: Registry[Scorer] = Registry("score", __name__)
METHODS = ("sf", "pp", "mp", "cp", "reap", "acp", "do_acp")  # the seven of docs/method.md#scores-and-selection


def pointwise(name: str, needs: tuple[str, ...]) -> Callable[[Score], Score]:
    """Registers a function from a layer's statistics to scores_E (float64, >= 0, higher is better) as the method `name`.

    Args:
        needs: the statistics it reads, beyond `tokens`.
    """

    def register(score: Score) -> Score:
        class Pointwise(PointwiseScorer):
            __doc__ = score.__doc__

            def needs(self) -> tuple[str, ...]:
                return needs

            def scores(self, stats: LayerStats) -> np.ndarray:
                return score(stats)

        Pointwise.__name__ = Pointwise.__qualname__ = score.__name__
        scorers.register(name)(Pointwise)
        return score

    return register


def ratio_where_selected(sum_E: np.ndarray, stats: LayerStats) -> np.ndarray:
    """sum_E / selected_count: the mean over the tokens that selected the expert, 0 for one that was never selected."""
    count_E = stats["selected_count"]
    return np.divide(sum_E, count_E, out=np.zeros_like(count_E), where=count_E > 0)


@pointwise("sf", needs=("selected_count",))
def selection_frequency(stats: LayerStats) -> np.ndarray:
    """How often the router selects the expert: selected_count / tokens. Name (paper), formula standard."""
    return stats["selected_count"] / stats.tokens


@pointwise("pp", needs=("prob_sum",))
def pre_selection_probability(stats: LayerStats) -> np.ndarray:
    """The mean router probability over all tokens, selected or not: prob_sum / tokens. Name (paper), formula (ours)."""
    return stats["prob_sum"] / stats.tokens


@pointwise("mp", needs=("selected_prob_sum",))
def marginal_probability(stats: LayerStats) -> np.ndarray:
    """The mean probability where selected, 0 elsewhere: selected_prob_sum / tokens (ours; equals the soft counting of SEER-MoE)."""
    return stats["selected_prob_sum"] / stats.tokens


@pointwise("cp", needs=("selected_prob_sum", "selected_count"))
def conditional_probability(stats: LayerStats) -> np.ndarray:
    """The mean router probability given selection: selected_prob_sum / selected_count, 0 if never selected (paper, Eq 3).

    The probability is the softmax over all E experts, not renormalised over the selected ones.
    """
    return ratio_where_selected(stats["selected_prob_sum"], stats)


@pointwise("reap", needs=("gated_norm_sum", "selected_count"))
def router_weighted_activation(stats: LayerStats) -> np.ndarray:
    """The mean of gate times output norm given selection: gated_norm_sum / selected_count, 0 if never selected.

    Formula of arXiv 2510.13999; (ours) as one of the seven.
    """
    return ratio_where_selected(stats["gated_norm_sum"], stats)


@pointwise("acp", needs=("selected_prob_sum", "selected_count", "gram"))
def activation_weighted_conditional_probability(stats: LayerStats) -> np.ndarray:
    """cp_e times the root mean square output norm of the expert over all tokens: cp_e * sqrt(gram_ee / tokens) (paper)."""
    return conditional_probability(stats) * np.sqrt(np.diag(stats["gram"]) / stats.tokens)


@scorers.register("random")
class Random(PointwiseScorer):
    """A uniform number in (0, 1) per expert, hashed from `seed` and the expert's own statistics (ours): the control every score has to
    beat.

    So renumbering the experts renumbers the choice, and layers differ. The probability is rounded to four digits, far above
    the rounding noise of how the calibration set was split.
    """

    seed: int = key(0, "another seed, another choice")

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("selected_count", "prob_sum")

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        keys = (f"{self.seed}:{count:.0f}:{prob:.3e}" for count, prob in zip(stats["selected_count"], stats["prob_sum"], strict=True))
        words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") for text in keys]
        return (np.array(words, np.float64) + 0.5) / 2.0**48


@scorers.register("d_optimal")
class DOptimal(Scorer):
    """Greedy maximum of log det(M_S + lambda Id), M_ij = sqrt(I_i I_j) gram_ij / tokens, for a chosen importance I (paper): the experts
    whose weighted outputs span the largest volume.

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
