"""`moe2dense score`: ranks experts from statistics alone, prints the ranking and writes ranking.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.common.table import render
from megatron_moe2dense.surgery.compare import compare_methods, compared_scorers, comparison_table, label, routing_kept, set_effective_rank
from megatron_moe2dense.surgery.config import ScoreConfig
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from megatron_moe2dense.surgery.types import Scorer

FORMAT = 1
_SHOWN = 6


def run(config: ScoreConfig) -> None:
    """Print the table and write the ranking.

    Raises:
        UserError: no statistics, a statistic the score needs is absent, keep out of range, the file exists.
    """
    output = _output(config)
    if output.exists() and not config.overwrite:
        raise UserError(f"{output} exists", "a path that does not exist yet", "choose another output or add overwrite=true")
    statistics = CalibratedStats.open(config.statistics)
    ranking = rank(statistics, config.score, config.keep)
    methods, left_out = compared_scorers(config.score, config.compare, statistics)
    ranking["comparison"] = compare_methods(methods, statistics, ranking["keep"]) if methods else None
    write_json(output, ranking)
    print(table(ranking, label(config.score)))
    if ranking["comparison"] is not None:
        print(f"\n{comparison_table(ranking['comparison'])}")
    if left_out:
        print(f"not compared, their statistics were not collected: {', '.join(left_out)}")
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
    count_E = stats.sums.get("selected_count")
    return {
        "layer": layer,
        "experts": selection.experts_K.tolist(),
        "scores": selection.scores_E.tolist(),
        "selected_fraction": None if count_E is None else (count_E / stats.tokens).tolist(),
        "routing_kept": routing_kept(stats, selection.experts_K),
        "effective_rank": set_effective_rank(stats, selection.experts_K),
    }


def table(ranking: dict[str, Any], name: str) -> str:
    """One row a layer: effective rank of the kept set, share of the router's choices it holds, its best experts (up to 6)."""
    rows = []
    for layer in ranking["layers"]:
        share, rank_of_kept, experts = layer["routing_kept"], layer["effective_rank"], layer["experts"]
        best = "  ".join(f"{expert} ({layer['scores'][expert]:#.3g})" for expert in experts[:_SHOWN])
        more = f"  and {len(experts) - _SHOWN} more" if len(experts) > _SHOWN else ""
        rows.append(
            [
                layer["layer"],
                "-" if rank_of_kept is None else f"{rank_of_kept:.2f}",
                "-" if share is None else f"{100 * share:.1f}",
                best + more,
            ]
        )
    return render(["layer", "effective rank", "routing kept [%]", f"experts best first: number ({name})"], rows)


def _output(config: ScoreConfig) -> Path:
    return Path(config.output) if config.output is not None else Path(config.statistics) / "ranking.json"


def dry_run(config: ScoreConfig) -> dict[str, Any]:
    """What would be read and written."""
    statistics = CalibratedStats.open(config.statistics)
    statistics.require(config.score.needs())
    compared, _ = compared_scorers(config.score, config.compare, statistics)
    return {
        "source": statistics.source,
        "layers": len(statistics.layers),
        "compared": list(compared),
        "reads": {str(statistics.directory): sum(v.nbytes for s in statistics.layers.values() for v in s.sums.values())},
        "writes": {str(_output(config)): len(statistics.layers) * statistics.source["experts"] * 48},
    }
