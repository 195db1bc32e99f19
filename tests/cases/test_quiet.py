"""What libraries say does not reach a user: the commands' own lines alone, in a process of their own, outside any git checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe2dense.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OURS = r"\d\d-\d\d \d\d:\d\d:\d\d [IW] .*"


def lines(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """stderr of a command that goes well."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("PYTHONWARNINGS", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "KINETO_LOG_LEVEL"):
        known.pop(name, None)  # as a user has them
    command = [sys.executable, "-m", "megatron_moe2dense", *arguments]
    done = subprocess.run(command, cwd=folder, env={**known, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_a_user_reads_the_output_of_distill(example: Path, tmp_path: Path):
    """Megatron-Core warns of each library that it does not find: not shown, unless PYTHONWARNINGS asks for warnings"""
    run = [f"student={example}/model", f"teacher={example}/model", "device=cpu", "dtype=float32", "batch={micro: 1, global: 1}"]
    data = "data={path: %s, sequence_length: 64}" % (example / "tokens/distill")
    found = lines(tmp_path, "distill", *run, data, "output=run", "train.steps=1")
    assert found
    assert [line for line in found if not re.fullmatch(OURS, line)] == []
    asked = lines(tmp_path, "distill", *run, data, "output=asked", "train.steps=1", "--dry-run", PYTHONWARNINGS="default")
    assert any("Warning: " in line for line in asked)


def test_a_user_reads_the_output_of_eval(example: Path, tmp_path: Path):
    """bars of transformers and lm-eval, lines of torch's profiler and of git: not shown in eval"""
    main(["make-task", f"data={example}/tokens/heldout", f"tokenizer={example}/model", f"output={tmp_path}/task", "questions=4"])
    perplexity = "perplexity.data={path: %s, sequence_length: 64, sequences: 4}" % (example / "tokens/heldout")
    measured = ["generation={prompt_tokens: 8, new_tokens: 2, batch: [1], repeats: 1}", "harness.tasks=[task/continuation.yaml]"]
    found = lines(tmp_path, "eval", f"models=[{example}/model]", "output=records.jsonl", perplexity, *measured, "overwrite=true")
    assert [line for line in found if not re.fullmatch(OURS, line)] == []
