"""Small inputs of every kind, as the stages write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from megatron_moe2dense.common import records


def ranking(layers: int = 3, experts: int = 8, keep: int = 2) -> dict[str, Any]:
    random = np.random.default_rng(0)
    rows = []
    for layer in range(layers):
        share = random.dirichlet(np.ones(experts)) * keep
        scores = random.random(experts)
        kept = [int(scores.argmin()), int(scores.argmax())]  # a set method may keep the lowest score
        rows.append(
            {"layer": layer, "experts": kept, "scores": scores.tolist(), "selected_fraction": share.tolist(), "effective_rank": 1.5}
        )
    return {"format": 1, "source": {}, "family": "qwen3_moe", "keep": keep, "score": {"method": "do_acp"}, "layers": rows}


def plan() -> dict[str, Any]:
    row = {"experts": [5, 1, 3], "group_of": [0, 1, 1], "merge_weights": [1.0, 0.75, 0.25], "scales": [0.5, 0.5]}
    head = {"format": 1, "source": {}, "family": "qwen3_moe", "keep": 3, "groups": 2, "score": {"method": "sf"}}
    return {**head, "group": {"method": "anchor"}, "scale": {"method": "uniform"}, "layers": [{"layer": i, **row} for i in (0, 2)]}


def metrics(steps: int = 6, start: float = 3.0, distilled: bool = True) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = start / step
        row = {"step": step, "tokens": 512 * step, "loss": loss, "kl": loss if distilled else None, "lr": 1e-3 / step}
        rows.append({**row, "grad_norm": 0.5 + step, "step_seconds": 0.1, "tokens_per_second": 5120.0, "skipped": False})
        if step % 3 == 0:
            rows.append({"step": step, "tokens": 512 * step, "eval_loss": loss + 1, "eval_kl": loss + 1 if distilled else None})
    return rows


def record(model: str, perplexity: float | None, kl: float | None, teacher: str = "models/teacher") -> dict[str, Any]:
    models = {"teacher": "models/teacher", "dense": "models/dense", "distilled": "models/distilled"}
    values = {"perplexity": perplexity, "kl": kl}
    found = {name: value for name, value in values.items() if value is not None}
    return {"model": model, "plan_hash": None, "config": {"models": models, "kl": {"teacher": teacher}}, "metrics": found}


def write_statistics(directory: Path, counts_LE: np.ndarray, tokens: float = 100.0) -> Path:
    directory.mkdir(parents=True)
    tensors = {f"layers.{i}.selected_count": np.asarray(count, np.float64) for i, count in enumerate(counts_LE)}
    tensors |= {f"layers.{i}.tokens": np.array([tokens]) for i in range(len(counts_LE))}
    save_file(tensors, directory / "stats.safetensors")
    return directory


def write_all(root: Path) -> Path:
    """One directory with every kind of file."""
    write_statistics(root, np.arange(24).reshape(3, 8))
    (root / "ranking.json").write_text(json.dumps(ranking()))
    (root / "plan.json").write_text(json.dumps(plan()))
    records.rewrite(root / "metrics.jsonl", metrics())
    records.rewrite(root / "records.jsonl", [record("teacher", 10.0, 0.0), record("dense", 90.0, 2.0), record("distilled", 12.0, 0.2)])
    return root
