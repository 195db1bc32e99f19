"""Before distillation: every choice with every refit."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from megatron_moe2dense.plots.style import FAINT, PALETTE, new_figure
from studies.beyond.section import Row, Section, evaluated
from studies.report import markdown

CHOICES = {
    "do_acp": "DO-ACP experts, uniform (paper)",
    "mp": "MP experts, proportional",
    "energy": "neurons by energy",
    "ols": "neurons by orthogonal least squares",
}
REFITS = {"": "as planned", "-parallel": "ridge, parallel", "-sequential": "ridge, sequential", "-reconstructed": "and reconstructed"}


def section(out: Path) -> Section | None:
    """Cross-entropies and how much of the paper's gap to the MoE they close.

    Raises:
        KeyError: a model is missing.
    """
    if not (out / "initial.jsonl").exists():
        return None
    found = evaluated(out / "initial.jsonl")
    rows = [{"choice": None, "refit": None, **found["moe"]}]
    rows += [{"choice": choice, "refit": refit, **found[choice + refit]} for choice in CHOICES for refit in REFITS]
    return Section(rows, _table(found), _figure(found))


def _table(found: dict[str, Row]) -> str:
    worst, teacher = found["do_acp"]["nll"], found["moe"]["nll"]

    def cell(model: str) -> str:
        nll = found[model]["nll"]
        return f"{nll:.3f} ({(worst - nll) / (worst - teacher):.0%})"

    body = [[title, *(cell(choice + refit) for refit in REFITS)] for choice, title in CHOICES.items()]
    return f"The MoE: {teacher:.3f} nats/token.\n\n" + markdown(["chosen by", *REFITS.values()], body)


def _figure(found: dict[str, Row]) -> Figure:
    """A line a choice, from as planned to reconstructed."""
    figure = new_figure(7.5, 4)
    axes = figure.add_subplot()
    for place, (choice, title) in enumerate(CHOICES.items()):
        values = [found[choice + refit]["nll"] for refit in REFITS]
        axes.plot(range(len(REFITS)), values, marker="o", color=PALETTE[place], label=title)
    axes.axhline(found["moe"]["nll"], color=FAINT, linestyle="--", label="the MoE")
    axes.set_xticks(range(len(REFITS)), list(REFITS.values()))
    axes.set_ylabel("held-out cross-entropy [nats/token]")
    axes.set_title("Before distillation")
    axes.grid(axis="y")
    axes.legend()
    return figure
