"""Which property of the chosen neurons tells the KL after distillation: properties of every choice, and how each orders them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.spectrum import effective_rank
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.select import output_energy
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import CalibratedStats
from megatron_moe2dense.surgery.types import NeuronPlan
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, windows
from studies.beyond.section import Row, Section, evaluated, runs
from studies.report import markdown

HELD_OUT = "examples/pico_moe/tokens/heldout"
PREDICTORS: dict[str, tuple[str, str]] = {
    "frequency": ("routed tokens", ".1%"),
    "coverage": ("energy", ".1%"),
    "diversity": ("directions", ".0f"),
    "residual": ("residual", ".3f"),
    "before": ("KL before", ".3f"),
}


def section(out: Path) -> Section | None:
    """Of the runs `seed_0/choices/NAME-REFIT`. Rank correlations are with the KL after distillation, over the choices that were not
    reconstructed, and over all for what reconstruction changes.

    Raises:
        KeyError: a choice was not evaluated before distillation.
    """
    records, after = out / "choices.jsonl", runs(out, "seed_0/choices/*")
    if not records.exists():
        return None
    before, measured = evaluated(records), measures(out / "seed_0/statistics")
    rows = []
    for folder, row in after:
        choice, refit = folder.name.rsplit("-", 1)
        of = {"choice": choice, "refit": refit, "before": before[folder.name]["kl"], **row}
        rows.append(of | properties(out / "seed_0/inits" / folder.name, measured))
    rows.sort(key=lambda row: (row["refit"] == "reconstructed", row["kl"]))
    return Section(rows, _table(rows))


def measures(statistics: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Of all neurons [E, I] of the MoE that the statistics are of, by layer: selections of their expert, and their energy."""
    opened = CalibratedStats.open(statistics)
    source = MoeSource.open(opened.source["path"])
    with CheckpointReader(source.index) as reader:
        energies = {layer: output_energy(source, reader, layer, stats) for layer, stats in opened.layers.items()}
    counts = {layer: stats["selected_count"][:, None] for layer, stats in opened.layers.items()}
    return {layer: (np.broadcast_to(counts[layer], energy_EI.shape), energy_EI) for layer, energy_EI in energies.items()}


def properties(model: Path, measured: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Row:
    """Means over the layers of a dense model that convert wrote. measured: `measures` of its MoE.

    frequency: share of the router's selections that fall on the chosen neurons' experts. coverage: of the gated activation energy times
    squared down-column norm. diversity: effective rank of the gated activations on held-out text. residual: relative error of the refit
    on its held-out windows.
    """
    plan = ConversionPlan.read(model / "plan.json")
    shares = [[float(_chosen(layer)(of_EI).sum() / of_EI.sum()) for of_EI in measured[layer.layer]] for layer in plan.layers]
    frequency, coverage = np.mean(shares, axis=0).tolist()
    report = json.loads((model / "refit.json").read_text())["layers"]
    return {
        "frequency": frequency,
        "coverage": coverage,
        "diversity": _diversity(model),
        "residual": float(
            np.mean([layer["held_out"] if layer.get("reconstructed") is None else layer["reconstructed"] for layer in report])
        ),
    }


def _chosen(layer: object) -> Callable[[np.ndarray], np.ndarray]:
    """From values of all neurons [E, I] to those of the chosen ones."""
    if isinstance(layer, NeuronPlan):
        return lambda values_EI: values_EI[list(layer.experts), list(layer.neurons)]
    return lambda values_EI: values_EI[list(layer.experts)]  # type: ignore[attr-defined]


@torch.no_grad()
def _diversity(model: Path) -> float:
    """exp(entropy of the eigenvalues) of the correlations between the inputs of the down projections, mean over layers."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = torch.from_numpy(windows(TokensConfig(path=HELD_OUT, sequence_length=256, sequences=64), Limits(dense.config.vocab_size)))
    grams: dict[int, torch.Tensor] = {}

    def watch(number: int) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            h_TF = inputs[0].flatten(0, -2).double()
            grams[number] = grams.get(number, 0) + h_TF.T @ h_TF

        return hook

    for number, layer in enumerate(dense.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(watch(number))
    for batch in text.split(16):
        dense(batch)
    sizes = {number: gram.diagonal().clamp(min=1e-30).sqrt() for number, gram in grams.items()}
    return float(np.mean([effective_rank((gram / sizes[n][:, None] / sizes[n]).numpy()) for n, gram in grams.items()]))


def _table(rows: Sequence[Row]) -> str:
    header = ["choice", "refit", *(title for title, _ in PREDICTORS.values()), "KL after"]
    body = [
        [row["choice"], row["refit"], *(format(row[name], form) for name, (_, form) in PREDICTORS.items()), f"{row['kl']:.4f}"]
        for row in rows
    ]
    solved = [row for row in rows if row["refit"] != "reconstructed"]
    for title, of in (("rank correlation", solved), ("and with the reconstructed", rows)):
        found = [spearmanr([row[name] for row in of], [row["kl"] for row in of]).statistic for name in PREDICTORS]
        body.append([f"*{title}*", f"*{len(of)}*", *(f"*{value:+.2f}*" for value in found), ""])
    return markdown(header, body)
