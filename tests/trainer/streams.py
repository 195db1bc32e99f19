"""Small streams of samples: their configs, files and content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.common.config import build
from megatron_moe2dense.tokens.indexed import write_token_file
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.samples import SampleStream
from tests.helpers.tiny_models import write_tokens

CPU, LENGTH = torch.device("cpu"), 8


def config(tmp_path: Path, steps: int = 6, size: int = 4, **data: Any) -> DistillConfig:
    if not {"path", "blend"} & set(data):
        data["path"] = write_tokens(tmp_path / "tokens", np.arange(24 * LENGTH + 1), vocab=500)
    settings = {
        "student": str(tmp_path),
        "teacher": None,
        "output": str(tmp_path / "run"),
        "data": {"sequence_length": LENGTH, **data},
        "batch": {"micro": 1, "global": size},
        "train": {"steps": steps},
    }
    return build(DistillConfig, settings, "the test")


def blend(tmp_path: Path) -> list[dict[str, Any]]:
    """Three files of 40, 20 and 10 samples; the tokens of each begin at their own thousand."""
    sizes, weights = (40, 20, 10), (0.6, 0.3, 0.1)
    paths = [write_tokens(tmp_path / f"source{i}", np.arange(n * LENGTH + 1) + 1000 * i, vocab=4000) for i, n in enumerate(sizes)]
    return [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]


def samples(stream: SampleStream, steps: int, size: int) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for step in range(steps) for batch in stream.micro_batches(step * size, size) for row in batch.tokens]


def documents(tmp_path: Path, *texts: list[int]) -> str:
    write_token_file(str(tmp_path / "documents"), [np.asarray(text) for text in texts], 500)
    return str(tmp_path / "documents")
