"""Distilling the example from a teacher cache over distilling it from the live teacher, on one process in one run: step time, bytes per
token beside full logits, and how far the two students' losses are apart after some steps. Prints lines `name value unit goal`."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.outputs import read_json, write_json
from megatron_moe2dense.families.dense import DenseForm
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.trainer import distill
from megatron_moe2dense.trainer.cache import write
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.config import DistillConfig

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/pico_moe"
LENGTH, MICRO, STEPS, K = 256, 8, 12, 64
VOCABULARY = 151_936  # Qwen3's, for the bytes of full logits


def dense_student(folder: Path) -> Path:
    """A random dense model of the shape that `convert` gives the example's teacher."""
    content = read_json(EXAMPLE / "model/config.json", "the example's config")
    active = content["num_experts_per_tok"] * content["moe_intermediate_size"]
    folder.mkdir()
    write_json(folder / "config.json", DenseForm(Stock.read(EXAMPLE / "model")).of(active).config(content))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).save_pretrained(folder)
    return folder


def rows(folder: Path, name: str, **settings: Any) -> list[dict[str, Any]]:
    """metrics.jsonl of one run."""
    base = {
        "student": str(folder / "student"),
        "output": str(folder / name),
        "data": {"path": str(EXAMPLE / "tokens/distill"), "sequence_length": LENGTH},
        "loss": {"method": "top_k_kl", "k": K},
        "optim": {"lr": 3e-3},
        "batch": {"micro": MICRO, "global": MICRO},
        "train": {"steps": STEPS, "save_every": 10_000, "log_every": 10_000},
        "dtype": "float32",
    }
    distill.run(build(DistillConfig, {**base, **settings}, "the benchmark"))
    return records.read(folder / name / "metrics.jsonl")


def main() -> None:
    """Write the cache in float16, then train on it and on the live teacher, in turns."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense_student(folder / "student")
        settings = {
            "teacher": str(EXAMPLE / "model"),
            "output": str(folder / "cache"),
            "data": {"path": str(EXAMPLE / "tokens/distill"), "sequence_length": LENGTH},
            "samples": STEPS * MICRO,
            "k": K,
            "micro_batch": MICRO,
            "dtype": "float32",
        }
        config = build(CacheTeacherConfig, settings, "the benchmark")
        began = time.perf_counter()
        write.run(config)
        written = time.perf_counter() - began
        runs: dict[str, list[list[dict[str, Any]]]] = {"live": [], "cached": []}
        for turn in range(2):
            runs["live"].append(rows(folder, f"live{turn}", teacher=str(EXAMPLE / "model")))
            runs["cached"].append(rows(folder, f"cached{turn}", teacher={"cache": str(folder / "cache")}))
    seconds = {kind: statistics.median(row["step_seconds"] for run in found for row in run[1:]) for kind, found in runs.items()}
    apart = abs(runs["cached"][0][-1]["loss"] - runs["live"][0][-1]["loss"])
    print(f"cache_bytes_per_token {config.bytes_per_token()} bytes -")
    print(f"cache_full_bfloat16_logits_over_cache_at_V_{VOCABULARY} {2 * VOCABULARY / config.bytes_per_token():.0f} ratio -")
    print(f"cache_write_tokens_per_second {STEPS * MICRO * LENGTH / written:.0f} tokens/s -")
    print(f"cache_step_time_over_live_teacher {seconds['cached'] / seconds['live']:.2f} ratio <1.0")
    print(f"cache_loss_apart_after_{STEPS}_steps {apart:.1e} nats -")


if __name__ == "__main__":
    main()
