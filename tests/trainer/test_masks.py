"""Masked predictions in a run, against a plain transformers loop; token files that change between its parts are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.tokens.indexed import write_token_file
from megatron_moe2dense.trainer import distill, runtime
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.samples import training_stream
from tests.helpers.tiny_models import tiny_qwen3, write_tokens

pytestmark = pytest.mark.slow

END, PAD, LENGTH, SAMPLES = 7, 3, 16, 4


def config(root: Path, **settings: Any) -> DistillConfig:
    base = {
        "student": str(root / "student"),
        "teacher": None,
        "output": str(root / "run"),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH},
        "batch": {"micro": 2, "global": SAMPLES},
        "train": {"steps": 1},
        "dtype": "float32",
    }
    return build(DistillConfig, {**base, **settings}, "the test")


def documents(path: Path) -> str:
    """Documents of 3 to 14 random tokens, each ended, some followed by padding."""
    draw = np.random.default_rng(0)
    texts = [np.concatenate([draw.integers(10, 256, draw.integers(3, 15)), [END], [PAD] * (i % 3)]) for i in range(9)]
    write_token_file(str(path), texts, 256)
    return str(path)


def test_a_masked_step_equals_a_plain_loop_over_the_unmasked_predictions(tmp_path: Path):
    tiny_qwen3(tmp_path / "student", seed=2)
    data: dict[str, Any] = {"path": documents(tmp_path / "tokens"), "sequence_length": LENGTH, "pad_token": PAD}
    # padding follows the ends, so the documents end with either
    data |= {"mask_end_of_document": True, "end_of_document": END}
    settings = config(tmp_path, data=data, output=str(tmp_path / "read"))
    with runtime.session("cpu") as device, process_groups.initialized(settings.parallel, 0) as groups:
        batches = training_stream(settings, groups, device.device, 256).micro_batches(0, SAMPLES)
    tokens, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels"))
    mask = (tokens != END) & (tokens != PAD) & (labels != PAD)
    assert 0 < mask.sum() < mask.numel()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    loss = torch.nn.functional.cross_entropy(model(input_ids=tokens).logits[mask], labels[mask])
    loss.backward()
    distill.run(config(tmp_path, data=data))
    row = records.read(tmp_path / "run/metrics.jsonl")[0]
    assert row["tokens"] == int(mask.sum())
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in model.parameters() if p.grad is not None]))
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_run_is_not_resumed_on_token_files_that_changed(tmp_path: Path):
    tiny_qwen3(tmp_path / "student", seed=2)
    for name in ("tokens", "held-out"):
        write_tokens(tmp_path / name, LENGTH * SAMPLES + 1)
    data = {
        "path": str(tmp_path / "tokens"),
        "sequence_length": LENGTH,
        "validation": str(tmp_path / "held-out"),
        "validation_sequences": 2,
    }
    settings = config(tmp_path, data=data)

    def again() -> None:
        manifest = tmp_path / "run/moe2dense.json"
        manifest.write_text(manifest.read_text().replace('"status": "finished"', '"status": "unfinished"'))
        distill.run(settings)

    distill.run(settings)
    again()
    for name, key in (("tokens", "data.sources"), ("held-out", "data.validation")):
        write_tokens(tmp_path / name, LENGTH * SAMPLES + 1, seed=4)
        with pytest.raises(UserError, match=rf"run of another config \({key}: "):
            again()
        write_tokens(tmp_path / name, LENGTH * SAMPLES + 1)
    again()
