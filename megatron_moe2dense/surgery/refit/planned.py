"""The refit block of a plan: what `convert` puts into plan.json, and carrying it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.surgery.calibrate import TextPass, chosen_compute, compute_facts
from megatron_moe2dense.surgery.config import ConvertConfig, RefitConfig
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.refit.fit import Refit, adds_plainly, parallel
from megatron_moe2dense.surgery.refit.layer import RIDGES
from megatron_moe2dense.surgery.refit.store import FittedLayers
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import windows


@dataclass(frozen=True)
class Place:
    """The working directory of an output, the bytes of hidden states that may stay in memory, and the processes that share the text."""

    directory: Path
    memory_budget: int
    ranks: Ranks


def with_refit(config: ConvertConfig, plan: ConversionPlan, source: MoeSource, ranks: Ranks) -> ConversionPlan:
    """The plan with the config's refit, or with the one it has, on text that is where the config says.

    Raises:
        UserError: both have one; data without any; a setting without effect; text of another content than the plan's.
    """
    if config.refit is not None:
        if plan.refit is not None:
            raise UserError(f"a refit block, and one in {config.plan}", "one of the two", "drop refit: the plan already holds it")
        assert config.data is not None, "ConvertConfig requires data for a refit"
        return replace(plan, refit=block(config.refit, config.data, source, ranks))
    if config.data is None and plan.refit is None:
        return plan
    if plan.refit is None:
        raise UserError(f"data, and no refit in {config.plan}", "data only for a refit", "drop data, or add refit.method=ridge")
    data = config.data or TokensConfig(**plan.refit["data"])
    settings = _settings(plan)
    found = block(settings, data, source, ranks)
    if found["text"] != plan.refit["text"]:
        raise UserError(
            f"{data.path}: other windows than those that {config.plan} was refitted on",
            f"text with the hash {plan.refit['text'][:12]}",
            "point data to the same token files with the same sequence_length, sequences and seed",
        )
    return replace(plan, refit=found)


def fit_planned(source: MoeSource, reader: CheckpointReader, plans: Sequence[tuple[ConversionPlan, Place]]) -> list[FittedLayers]:
    """Carry out the plans' refits, from where an earlier run was killed; the layers lie in the working directories. Refits in parallel mode
    on one text share its pass.

    Raises:
        UserError: hidden states that are not finite; a full disk.
    """
    texts: dict[str, np.ndarray] = {}
    refits = [_refit(source, reader, plan, place, texts) for plan, place in plans]
    todo = [refit for refit in refits if not all(layer.layer in refit.fits for layer in refit.plan.layers)]
    together: dict[str, list[Refit]] = {}
    for refit in todo:
        if refit.config.mode == "sequential":
            refit.sequential()
        else:
            together.setdefault(json.dumps(refit.plan.refit), []).append(refit)
    for equal in together.values():
        parallel(equal)
    return [refit.fits for refit in refits]


def _refit(source: MoeSource, reader: CheckpointReader, plan: ConversionPlan, place: Place, texts: dict[str, np.ndarray]) -> Refit:
    """texts: those read already, by their data block."""
    assert plan.refit is not None, "only a plan with a refit is fitted"
    settings, data, ranks = _settings(plan), TokensConfig(**plan.refit["data"]), place.ranks
    if ranks.rank > 0:
        ranks.wait()  # for what rank 0 makes of an earlier run's files
    fits = FittedLayers(place.directory / "refit", plan.hash())
    if ranks.rank == 0:
        ranks.wait()
    name = json.dumps(plan.refit["data"])
    if name not in texts:
        texts[name] = _text(data, source, settings)
    compute = _compute(settings, data, ranks)
    return Refit(source, reader, plan, texts[name], compute, settings, fits, place.memory_budget, ranks)


def cost(source: MoeSource, plan: ConversionPlan) -> dict[str, Any]:
    """FLOPs of a plan's refit beyond the passes over its text, by layer, and bytes: sums of both parts of the text, their whole and
    what is factorised, each F x F in float64, and the hidden states."""
    assert plan.refit is not None, "asked of a plan with a refit"
    settings, data = _settings(plan), TokensConfig(**plan.refit["data"])
    hidden, tokens = source.dims.hidden_size, _text(data, source, settings).size
    width = (plan.neurons or plan.groups * source.dims.expert_width) + (source.dims.shared_width if settings.shared == "refitted" else 0)
    solves = 2 if isinstance(settings.ridge, float) else 2 + len(RIDGES)
    streams = 1 if settings.mode == "parallel" else 2
    element = _compute(settings, data, Ranks()).dtype.itemsize
    facts = {
        "tokens": tokens,
        "flops of a layer's sums": 2 * tokens * width * (width + hidden),
        "flops of a layer's solutions": solves * (width**3 // 3 + 2 * width**2 * hidden),
        "memory_bytes": 5 * 8 * width * (width + hidden),
        "hidden state bytes": streams * tokens * hidden * element,
    }
    if settings.reconstruct is not None:  # three products forward, six backward; weights, gradients, two moments, the kept and the new ones
        facts["flops of a layer's reconstruction"] = settings.reconstruct.epochs * tokens * 3 * 6 * width * hidden
        facts["memory_bytes"] = max(facts["memory_bytes"], 6 * 4 * 3 * width * hidden)
        facts["hidden state bytes"] += tokens * hidden * (element + 4)  # a layer's inputs, and targets in float32
    return facts


def _settings(plan: ConversionPlan) -> RefitConfig:
    assert plan.refit is not None, "asked of a plan with a refit"
    return RefitConfig(**{name: value for name, value in plan.refit.items() if name in RefitConfig.model_fields})


def block(settings: RefitConfig, data: TokensConfig, source: MoeSource, ranks: Ranks) -> dict[str, Any]:
    """A plan's refit: all that the solved weights depend on; device and batch only as far as rounding goes.

    Raises:
        UserError: a setting without effect, text too short to judge on, a mode that does not go with the model.
    """
    if settings.shared == "refitted" and not (source.dims.shared_width and source.seam == "block"):
        expected = f"no refit.shared for {source.family}, where no shared experts become neurons"
        raise UserError("refit.shared=refitted", expected, "drop refit.shared")
    windows_NS, compute = _text(data, source, settings), _compute(settings, data, ranks)
    if settings.mode == "sequential":
        with CheckpointReader(source.index) as reader:
            plainly = adds_plainly(source, reader, compute, windows_NS)
        if not plainly:
            raise UserError(
                f"refit.mode=sequential for {source.family}, whose layers do more with an FFN's output than add it (a norm, a factor)",
                "for that mode, layers that add it to the residual stream as it is",
                "use refit.mode=parallel (docs/families.md)",
            )
    text = hashlib.sha256(f"{windows_NS.shape}".encode() + windows_NS.tobytes()).hexdigest()
    dumped = settings.model_dump(mode="json")
    if settings.reconstruct is None:  # plans made before there was this key are the same plans
        del dumped["reconstruct"]
    return {**dumped, "data": data.model_dump(mode="json"), "text": text, "compute": compute_facts(compute, ranks)}


def _compute(settings: RefitConfig, data: TokensConfig, ranks: Ranks) -> Compute:
    return chosen_compute(TextPass(data, settings.batch_tokens, settings.device, settings.dtype), ranks)


def _text(data: TokensConfig, source: MoeSource, settings: RefitConfig) -> np.ndarray:
    windows_NS = windows(data, source.dims)
    if (settings.ridge == "auto" or settings.reconstruct is not None) and len(windows_NS) < 2:
        asked = "refit.ridge=auto" if settings.ridge == "auto" else "refit.reconstruct"
        raise UserError(
            f"{asked} with {len(windows_NS)} window of text",
            "at least two: one to fit on and one to judge",
            "use more data.sequences" + (", or give refit.ridge a number" if settings.reconstruct is None else ""),
        )
    return windows_NS
