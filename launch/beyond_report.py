"""The tables and figures of launch/beyond_pico.sh: python -m launch.beyond_report OUT DOCUMENT, from the repository's root.

Rewrites what stands between the document's markers; beside the document go beyond_records.jsonl and images/beyond_{initial,distilled}.png.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from launch.report import lines, markdown, parts_around, put_between, spread
from megatron_moe2dense.common import records
from megatron_moe2dense.plots.style import FAINT, PALETTE, log_axis, new_figure, short, style

INITIAL = ("<!-- launch/beyond_pico.sh: initial -->", "<!-- end of initial -->")
DISTILLED = ("<!-- launch/beyond_pico.sh: distilled -->", "<!-- end of distilled -->")
TUNED = ("<!-- launch/beyond_pico.sh: tuned -->", "<!-- end of tuned -->")
CHOICES = {
    "do_acp": "DO-ACP experts, uniform (paper)",
    "mp": "MP experts, proportional",
    "energy": "neurons by energy",
    "ols": "neurons by orthogonal least squares",
}
REFITS = {"": "as planned", "-parallel": "ridge, parallel", "-sequential": "ridge, sequential", "-reconstructed": "and reconstructed"}
BASELINE = ("do_acp", "adamw")
Row = dict[str, Any]


def initial(out: Path) -> list[Row]:
    """Models before distillation: choice and refit (None for the MoE), cross-entropy [nats/token] and KL to the MoE."""
    rows = []
    for record in lines(out / "initial.jsonl"):
        name, _, refit = record["model"].partition("-")
        of = {"choice": name, "refit": f"-{refit}" if refit else ""} if name in CHOICES else {"choice": None, "refit": None}
        rows.append({**of, "nll": record["metrics"]["nll"], "kl": record["metrics"]["kl"], "parameters": record["parameters"]})
    return rows


def distilled(out: Path) -> list[Row]:
    """The arms `seed_S/arms/INIT.NAME.STEPS` by their last evaluation, on all held-out text; unfinished ones are left out."""
    return [{**row, "seed": int(file.parents[2].name.removeprefix("seed_"))} for file, row in _runs(out, "seed_*/arms")]


def tuned(out: Path) -> list[Row]:
    """The runs `seed_0/tune/INIT.NAME.STEPS`, on a part of that text."""
    return [{**row, "tuning": True} for _, row in _runs(out, "seed_0/tune")]


def _runs(out: Path, folders: str) -> Iterator[tuple[Path, Row]]:
    for file in sorted(out.glob(f"{folders}/*/metrics.jsonl")):
        last = lines(file)[-1]
        if last.get("eval_kl") is not None:
            init, name = file.parent.name.rpartition(".")[0].split(".", 1)
            yield file, {"init": init, "arm": name, "tokens": last["tokens"], "kl": last["eval_kl"], "nll": last["eval_loss"]}


def initial_table(rows: Sequence[Row]) -> str:
    """Cross-entropy of every choice with every refit, and how much of the paper's gap to the MoE it closes."""
    teacher = next(row["nll"] for row in rows if row["choice"] is None)
    found = {(row["choice"], row["refit"]): row["nll"] for row in rows}
    gap = found["do_acp", ""] - teacher

    def cell(choice: str, refit: str) -> str:
        nll = found[choice, refit]
        return f"{nll:.3f} ({(found['do_acp', ''] - nll) / gap:.0%})"

    body = [[title, *(cell(choice, refit) for refit in REFITS)] for choice, title in CHOICES.items()]
    return f"The MoE: {teacher:.3f} nats/token.\n\n" + markdown(["chosen by", *REFITS.values()], body)


def kl(rows: Sequence[Row], key: tuple[str, str], tokens: int) -> list[float]:
    """Of all seeds."""
    chosen = [row for row in rows if (row["init"], row["arm"]) == key and row["tokens"] == tokens]
    return [row["kl"] for row in sorted(chosen, key=lambda row: row["seed"])]


def keys(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Arms, the baseline first."""
    return sorted({(row["init"], row["arm"]) for row in rows}, key=lambda key: (key != BASELINE, key))


def distilled_table(rows: Sequence[Row]) -> str:
    """KL to the MoE after so many tokens, mean and spread over seeds."""
    budgets = sorted({row["tokens"] for row in rows})
    body = []
    for key in keys(rows):
        found = [kl(rows, key, tokens) for tokens in budgets]
        body.append([*key, *(spread(values, 4) if values else "" for values in found), max(map(len, found))])
    return markdown(["init", "training", *(f"{tokens / 1e6:.2f}M tokens" for tokens in budgets), "seeds"], body)


def tuned_table(rows: Sequence[Row]) -> str:
    """Every run, the best of a start and a budget first."""
    order = sorted(rows, key=lambda row: (row["tokens"], row["init"], row["kl"]))
    return markdown(
        ["start", "training", "tokens", "KL"], [[row["init"], row["arm"], short(row["tokens"]), f"{row['kl']:.4f}"] for row in order]
    )


def tokens_to(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Tokens at which (tokens, KL) points reach a KL, straight between them in logarithms; None: beyond the last."""
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= wanted <= high:
            share = (math.log(high) - math.log(wanted)) / (math.log(high) - math.log(low))
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None


def reached(rows: Sequence[Row]) -> str:
    """Tokens that each arm with several budgets needs to the last KL of the baseline, as a share of the baseline's, seed by seed."""
    last = max(row["tokens"] for row in rows if (row["init"], row["arm"]) == BASELINE)
    body = []
    for key in keys(rows):
        shares = []
        for seed in sorted({row["seed"] for row in rows}):
            own = sorted((row["tokens"], row["kl"]) for row in rows if (row["init"], row["arm"], row["seed"]) == (*key, seed))
            goal = [row["kl"] for row in rows if (row["init"], row["arm"]) == BASELINE and (row["seed"], row["tokens"]) == (seed, last)]
            tokens = tokens_to(own, goal[0]) if goal and len(own) > 1 else None
            shares += [tokens / last] if tokens is not None else []
        if shares and key != BASELINE:
            body.append([*key, spread(shares, 3), len(shares)])
    return markdown(["init", "training", f"share of {last / 1e6:.2f}M tokens", "seeds"], body) if body else ""


def draw_initial(rows: Sequence[Row]) -> Figure:
    """A line a choice, from as planned to reconstructed."""
    figure = new_figure(7.5, 4)
    axes = figure.add_subplot()
    for place, (choice, title) in enumerate(CHOICES.items()):
        values = [next(row["nll"] for row in rows if (row["choice"], row["refit"]) == (choice, refit)) for refit in REFITS]
        axes.plot(range(len(REFITS)), values, marker="o", color=PALETTE[place], label=title)
    axes.axhline(next(row["nll"] for row in rows if row["choice"] is None), color=FAINT, linestyle="--", label="the MoE")
    axes.set_xticks(range(len(REFITS)), list(REFITS.values()))
    axes.set_ylabel("held-out cross-entropy [nats/token]")
    axes.set_title("Before distillation")
    axes.grid(axis="y")
    axes.legend()
    return figure


def draw_distilled(rows: Sequence[Row]) -> Figure:
    """KL over tokens of the arms with several budgets; each point is a run of its own, with its whole schedule."""
    figure = new_figure(7.5, 4.5)
    axes = figure.add_subplot()
    several = [key for key in keys(rows) if len({row["tokens"] for row in rows if (row["init"], row["arm"]) == key}) > 1]
    for place, key in enumerate(several):
        own = [row for row in rows if (row["init"], row["arm"]) == key]
        budgets = sorted({row["tokens"] for row in own})
        color = PALETTE[place % len(PALETTE)]
        axes.plot(budgets, [statistics.mean(kl(rows, key, tokens)) for tokens in budgets], color=color, label=", ".join(key))
        axes.plot([row["tokens"] for row in own], [row["kl"] for row in own], "o", color=color, alpha=0.6)
    axes.set_xscale("log")
    budgets = sorted({row["tokens"] for row in rows if (row["init"], row["arm"]) in several})
    axes.set_xticks(budgets, [short(tokens) for tokens in budgets])
    axes.minorticks_off()
    log_axis(axes)
    axes.set_xlabel("distillation tokens of the run")
    axes.set_ylabel("KL to the MoE [nats/token]")
    axes.grid(axis="y")
    axes.legend()
    return figure


def main(out: Path, document: Path) -> None:
    """Write records, figures and tables: those of the arms only where there are some.

    Raises:
        ValueError: the document has no markers. OSError, KeyError, StopIteration: a model of the first table is missing.
    """
    for markers in (INITIAL, TUNED, DISTILLED):
        parts_around(document, markers)  # before any work
    before, after, tuning = initial(out), distilled(out), tuned(out)
    texts = {INITIAL: initial_table(before)}
    put_between(document, INITIAL, texts[INITIAL])
    folder = document.parent / "images"
    folder.mkdir(exist_ok=True)
    with style():
        draw_initial(before).savefig(folder / "beyond_initial.png", dpi=150)
        if after:
            draw_distilled(after).savefig(folder / "beyond_distilled.png", dpi=150)
    if after:
        texts[DISTILLED] = distilled_table(after) + "\n\n" + reached(after)
        put_between(document, DISTILLED, texts[DISTILLED])
    if tuning:
        texts[TUNED] = tuned_table(tuning)
        put_between(document, TUNED, texts[TUNED])
    records.rewrite(document.with_name("beyond_records.jsonl"), [*before, *tuning, *after])
    print("\n\n".join(texts.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
