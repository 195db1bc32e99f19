"""The tables and figures of studies/study_pico.sh: python -m studies.study_report OUT DOCUMENT, from the repository's root.

Rewrites what stands between the document's markers; beside the document go study_records.jsonl, a row for each arm and seed, and
images/study_{quality,training}.png.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_moe2dense.common import records
from megatron_moe2dense.plots.style import FAINT, PALETTE, log_axis, new_figure, short, style
from studies.report import lines, markdown, parts_around, put_between, spread

BEGIN, END = "<!-- studies/study_pico.sh: begin -->", "<!-- studies/study_pico.sh: end -->"
# In the paper's order, best first; its average score of the five tasks for Qwen3-30B-A3B, none for the last (docs/method.md).
ARMS = {
    "do_acp": ("DO-ACP, K = G", 58.10),
    "sf": ("SF, K = 2 G, weight clustering", 53.46),
    "d2d": ("D2D: pruned dense teacher", 51.84),
    "random_ffn": ("random FFNs, teacher's attention", 45.44),
    "random": ("all random", None),
}
# name, digits, whether more is better
MEASURES = {"kl": ("KL to the MoE [nats]", 4, False), "perplexity": ("perplexity", 2, False), "accuracy": ("local task [%]", 1, True)}
Row = dict[str, Any]


def _measured(record: Row) -> Row:
    metrics = record["metrics"]
    return {"kl": metrics["kl"], "perplexity": metrics["perplexity"], "accuracy": 100 * metrics["accuracy"]["continuation"]}


def collect(out: Path) -> tuple[list[Row], list[Row]]:
    """One row for each teacher, and one for each arm and seed with its training curve (evaluations: tokens, loss).

    Raises:
        ValueError: there is no finished seed. OSError, KeyError: a part of one is missing.
    """
    teachers = [
        {"teacher": record["model"], "parameters": record["parameters"], **_measured(record)} for record in lines(out / "teachers.jsonl")
    ]
    rows: list[Row] = []
    for folder in sorted(out.glob("seed_*")):
        own = lines(folder / "own_teacher.jsonl")[0]["metrics"]["kl"]
        for record in lines(folder / "records.jsonl"):
            steps = lines(folder / record["model"] / "run" / "metrics.jsonl")
            row = {"arm": record["model"], "seed": int(folder.name.removeprefix("seed_")), **_measured(record)}
            row |= {"parameters": record["parameters"], "kl_own_teacher": own if record["model"] == "d2d" else row["kl"]}
            # the median, since other jobs may have shared the machine for a while
            timed = [step["step_seconds"] for step in steps if "step_seconds" in step]
            row["seconds"] = statistics.median(timed) * len(timed)
            row["curve"] = [[step["tokens"], step["eval_loss"]] for step in steps if "eval_loss" in step]
            rows.append(row)
    if not rows:
        raise ValueError(f"{out} has no seed_*/records.jsonl")
    return teachers, rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, an arm a line, the best mean of every measure in bold."""
    means = {name: {arm: statistics.mean(_values(rows, arm, name)) for arm in ARMS} for name in MEASURES}
    best = {name: (max if MEASURES[name][2] else min)(means[name], key=means[name].__getitem__) for name in MEASURES}
    heads = ["arm", *(title for title, _, _ in MEASURES.values())]
    heads += ["KL to its own teacher [nats]", "distillation, median step x steps [s]", "paper's average"]
    body = []
    for arm, (title, paper) in ARMS.items():
        cells = [spread(_values(rows, arm, name), digits) for name, (_, digits, _) in MEASURES.items()]
        cells = [f"**{cell}**" if best[name] == arm else cell for name, cell in zip(MEASURES, cells, strict=True)]
        cells += [spread(_values(rows, arm, "kl_own_teacher"), 4), spread(_values(rows, arm, "seconds"), 0)]
        body.append([title, *cells, "-" if paper is None else f"{paper:.2f}"])
    return markdown(heads, body)


def verdict(rows: Sequence[Row]) -> str:
    """For every measure, neighbours in the paper's order: does it hold on the mean, and in how many seeds."""
    pairs = list(zip(list(ARMS)[:-1], list(ARMS)[1:], strict=True))
    body = []
    for better, worse in pairs:
        cells = []
        for name, (_, _, more) in MEASURES.items():
            sign = 1 if more else -1
            gaps = [sign * (a - b) for a, b in zip(_values(rows, better, name), _values(rows, worse, name), strict=True)]
            holds = "holds" if statistics.mean(gaps) > 0 else "does not hold"
            cells.append(f"{holds}, {sum(gap > 0 for gap in gaps)} of {len(gaps)} seeds")
        body.append([f"{better} before {worse}", *cells])
    return markdown(["the paper's order", *(title for title, _, _ in MEASURES.values())], body)


def _values(rows: Sequence[Row], arm: str, name: str) -> list[float]:
    found = [row[name] for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == arm]
    assert len(found) == len({row["seed"] for row in rows}), f"every seed has {arm}"
    return found


def text(teachers: Sequence[Row], rows: Sequence[Row]) -> str:
    """What stands between the markers."""
    seeds = len({row["seed"] for row in rows})
    said = [
        f"{row['teacher']} teacher: {row['parameters']:,} parameters, perplexity {row['perplexity']:.2f}, "
        f"local task {row['accuracy']:.1f}%."
        for row in teachers
    ]
    students = {row["parameters"] for row in rows}
    said.append(
        f"Students: {', '.join(f'{count:,}' for count in sorted(students))} parameters. Mean ± standard deviation of {seeds} seeds."
    )
    return "\n\n".join([" ".join(said), table(rows), verdict(rows)])


def figures(rows: Sequence[Row], folder: Path) -> None:
    """study_quality.png: every seed of every arm, by measure; study_training.png: held-out loss over tokens."""
    folder.mkdir(exist_ok=True)
    with style():
        quality(rows).savefig(folder / "study_quality.png", dpi=150)
        training(rows).savefig(folder / "study_training.png", dpi=150)


def quality(rows: Sequence[Row]) -> Figure:
    """A panel a measure, on the scale of the arms that begin with a teacher's weights; the mean of the one that does not is written out."""
    figure = new_figure(10, 3.4)
    for axes, (name, (title, digits, more)) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES.items(), strict=True):
        for place, arm in enumerate(ARMS):
            values = _values(rows, arm, name)
            if arm == "random":
                said = f"{statistics.mean(values):.{min(digits, 2)}f}"
                spot, text = (0.02, f"< {said}") if more else (0.98, f"{said} >")
                axes.annotate(text, (spot, place), xycoords=("axes fraction", "data"), ha="left" if more else "right", color=PALETTE[place])
                continue
            axes.plot(values, [place] * len(values), "o", color=PALETTE[place], alpha=0.7)
            axes.plot([statistics.mean(values)], [place], "|", color=FAINT, markersize=18)
        axes.margins(x=0.2)
        axes.set_title(title)
        axes.set_yticks(range(len(ARMS)), [title for title, _ in ARMS.values()])
        axes.grid(axis="x")
        axes.set_ylim(len(ARMS) - 0.5, -0.5)
    return figure


def training(rows: Sequence[Row]) -> Figure:
    """Left: the loss of every arm. Right: how far it is above that of DO-ACP with the same seed, and so on the same held-out draw."""
    figure = new_figure(11, 4)
    whole, apart = figure.subplots(1, 2)
    first = {row["seed"]: dict(row["curve"]) for row in rows if row["arm"] == "do_acp"}
    for place, (arm, (title, _)) in enumerate(ARMS.items()):
        for number, row in enumerate(row for row in rows if row["arm"] == arm):
            tokens, losses = zip(*row["curve"], strict=True)
            look = {"color": PALETTE[place], "alpha": 0.8, "label": title if number == 0 else None}
            whole.plot(tokens, losses, **look)
            if arm != "random":
                apart.plot(tokens, [loss - first[row["seed"]][at] for at, loss in row["curve"]], **look)
    for axes, said in ((whole, "held-out loss [nats/token]"), (apart, "above DO-ACP of the seed [nats/token]")):
        axes.set_xlabel("distillation tokens")
        axes.set_ylabel(said)
        axes.xaxis.set_major_formatter(lambda value, _place: short(value))
    log_axis(whole)
    whole.legend()
    return figure


def main(out: Path, document: Path) -> None:
    """Write the records, the figures and the document's tables.

    Raises:
        ValueError: the document has no markers; besides those of `collect`.
    """
    parts_around(document, (BEGIN, END))  # before any work
    teachers, rows = collect(out)
    put_between(document, (BEGIN, END), text(teachers, rows))
    records.rewrite(document.with_name("study_records.jsonl"), [*teachers, *rows])
    figures(rows, document.parent / "images")
    print(text(teachers, rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
