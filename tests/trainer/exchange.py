"""A run that one interpreter begins, and another resumes and exports: `launch/pythons.sh` calls it in an environment of each.

python -m tests.trainer.exchange begin DIR     four steps with a checkpoint every two, and its export
python -m tests.trainer.exchange go_on DIR     its end exported here to the same bytes; from step 2 on to the same curve and weights
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_moe2dense.common.config import build
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.trainer import distill
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.tiny_models import tiny_qwen3, write_tokens

STEPS, SEQUENCE = 4, 16
LOSS, WEIGHTS = 1e-5, 1e-4  # between builds of torch and versions of Megatron-Core


def train() -> None:
    settings = {
        "student": "student",
        "teacher": None,
        "output": "run",
        "data": {"path": "tokens", "sequence_length": SEQUENCE},
        "batch": {"micro": 2, "global": 4},
        "train": {"steps": STEPS, "save_every": 2, "keep": STEPS},
        "dtype": "float32",
    }
    distill.run(build(DistillConfig, settings, "the exchange"))


def export_to(output: Path, run: Path) -> dict[str, torch.Tensor]:
    export.run(build(ExportConfig, {"checkpoint": str(run), "output": str(output)}, "the exchange"))
    return load_file(output / "model.safetensors")


def losses(run: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


def begin(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", SEQUENCE * 4 * STEPS + 1)
    with contextlib.chdir(root):
        train()
        export_to(Path("export"), Path("run"))


def go_on(root: Path) -> None:
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(root, copy, dirs_exist_ok=True)
        with contextlib.chdir(copy):
            again = export_to(Path("again"), Path("run"))  # their last checkpoint, read here
            shutil.rmtree(Path("run/checkpoints") / f"step_{STEPS:08d}")
            manifest = Path("run/moe2dense.json")
            manifest.write_text(manifest.read_text().replace('"status": "finished"', '"status": "unfinished"'))
            train()
            resumed, expected = export_to(Path("resumed"), Path("run")), load_file("export/model.safetensors")
            torch.testing.assert_close(again, expected, rtol=0, atol=0)
            torch.testing.assert_close(resumed, expected, rtol=WEIGHTS, atol=WEIGHTS)
            torch.testing.assert_close(losses(Path("run")), losses(root / "run"), rtol=LOSS, atol=0)
            assert len(losses(Path("run"))) == STEPS


if __name__ == "__main__":
    {"begin": begin, "go_on": go_on}[sys.argv[1]](Path(sys.argv[2]).resolve())
