"""`moe2dense score`: ranks experts from statistics alone, prints the ranking and writes ranking.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.common.table import render
from megatron_moe2dense.surgery.config import ScoreConfig
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from megatron_moe2dense.surgery.types import Scorer

FORMAT = 1
_SHOWN = 8


def run(config: ScoreConfig) -> None:
    """Print the table and write the ranking.

    Raises:
        UserError: no statistics, a statistic the score needs is absent, keep out of range, the file exists.
    """
    output = _output(config)
    if output.exists() and not config.overwrite:
        raise UserError(f"{output} exists", "a path that does not exist yet", "choose another output or add overwrite=true")
    ranking = rank(CalibratedStats.open(config.statistics), config.score, config.keep)
    write_json(output, ranking)
    print(table(ranking))
    print(f"\n{output}: {ranking['keep']} of {ranking['source']['experts']} experts in {len(ranking['layers'])} layers")


def rank(statistics: CalibratedStats, scorer: Scorer, keep: int | None) -> dict[str, Any]:
    """The content of ranking.json. keep None: the router's top-k."""
    statistics.require(scorer.needs())
    kept: int = keep or statistics.source["active"]
    return {
        "format": FORMAT,
        "source": statistics.source,
        "family": statistics.source["family"],
        "keep": kept,
        "score": scorers.dump(scorer),
        "layers": [_rank_layer(layer, stats, scorer, kept) for layer, stats in statistics.layers.items()],
    }


def _rank_layer(layer: int, stats: LayerStats, scorer: Scorer, keep: int) -> dict[str, Any]:
    selection = scorer.select(stats, keep)
    count_E, gram_EE = stats.sums.get("selected_count"), stats.sums.get("gram")
    return {
        "layer": layer,
        "experts": selection.experts_K.tolist(),
        "scores": selection.scores_E.tolist(),
        "selected_fraction": None if count_E is None else (count_E / stats.tokens).tolist(),
        "effective_rank": None if gram_EE is None else effective_rank(gram_EE[np.ix_(selection.experts_K, selection.experts_K)]),
    }


def effective_rank(gram_KK: np.ndarray) -> float:
    """exp(entropy of the normalised eigenvalues): how many directions a set of experts really spans, 1..K; 0 for a zero matrix."""
    values = np.clip(np.linalg.eigvalsh(gram_KK), 0.0, None)
    if values.sum() == 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def table(ranking: dict[str, Any]) -> str:
    """The best experts of each layer (up to 8), one row each: number, score, share of tokens; the set's effective rank."""
    rows = []
    for layer in ranking["layers"]:
        for place, expert in enumerate(layer["experts"][:_SHOWN]):
            fraction = layer["selected_fraction"]
            rows.append(
                [
                    str(layer["layer"]) if place == 0 else "",
                    place + 1,
                    expert,
                    float(layer["scores"][expert]),
                    None if fraction is None else 100 * fraction[expert],
                    f"{layer['effective_rank']:.2f}" if place == 0 and layer["effective_rank"] is not None else "",
                ]
            )
    method = ranking["score"]["method"]
    rank_of_kept = f"effective rank of the {ranking['keep']} kept"
    return render(["layer", "rank", "expert", f"score ({method})", "tokens that select it [%]", rank_of_kept], rows)


def _output(config: ScoreConfig) -> Path:
    return Path(config.output) if config.output is not None else Path(config.statistics) / "ranking.json"


def dry_run(config: ScoreConfig) -> dict[str, Any]:
    """What would be read and written."""
    statistics = CalibratedStats.open(config.statistics)
    statistics.require(config.score.needs())
    return {
        "source": statistics.source,
        "layers": len(statistics.layers),
        "reads": {str(statistics.directory): sum(v.nbytes for s in statistics.layers.values() for v in s.sums.values())},
        "writes": {str(_output(config)): len(statistics.layers) * statistics.source["experts"] * 48},
    }
