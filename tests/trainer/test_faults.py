"""Ranks that are killed in every phase of a run, that stop answering, that find the disk full or their inputs gone: the message says
so, and the same command ends like a run in which nothing happened. A quarter of `MOE2DENSE_KILLS` (`make chaos`: 20) is how often
each phase is killed."""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from tests.helpers.forks import forks
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer import runs
from tests.trainer.faults import PHASES
from tests.trainer.runs import TIMED

ROUNDS = max(1, int(os.environ.get("MOE2DENSE_KILLS", "4")) // 4)
STEPS, LENGTH = 18, 16
OF_TRAINING = [phase for phase in PHASES if not phase.startswith(("export", "shard"))]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", LENGTH * 4 * STEPS + 1)
    write_tokens(root / "held-out", LENGTH * 4 + 1, seed=5)
    return root


def distill(root: Path, output: Path, **overrides: Any) -> list[str]:
    often = {"train.steps": STEPS, "train.save_every": 2, "train.eval_every": 6, "teacher_check.stock_forward": "never"}
    return runs.command(root, output, LENGTH, often, overrides)


def exported(run: Path) -> dict[str, torch.Tensor]:
    target = run.with_name(f"{run.name} exported")
    if not target.exists():
        forks().run(["export", f"checkpoint={run}", f"output={target}", "dtype=float32"])
    return load_file(target / "model.safetensors")


def rows(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in records.read(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(root: Path) -> Path:
    """Two processes, nothing happens."""
    forks().run(distill(root, root / "straight"), 2)
    return root / "straight"


def assert_equal(run: Path, straight: Path) -> None:
    assert rows(run) == rows(straight)
    found, expected = exported(run), exported(straight)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_run_killed_in_every_phase_ends_like_an_uninterrupted_one(round_: int, root: Path, straight: Path):
    """One run: a rank is killed in the first phase, the same command is started again and killed in the next, and so on."""
    draw, run = random.Random(round_), root / f"killed {round_}"
    for phase in draw.sample(OF_TRAINING, len(OF_TRAINING)):
        where = (draw.choice(PHASES[phase][1]), phase, 1 if phase.startswith("checkpoint") else draw.randint(1, 2))
        codes = forks().start(distill(root, run), 2, fault=("at", [where, "kill"])).wait()
        assert codes[where[0]] == -9, phase
        assert json.loads((run / "moe2dense.json").read_text())["status"] == "unfinished"
    forks().run(distill(root, run), 2)
    assert_equal(run, straight)


@pytest.mark.parametrize("phase", ["export tensor", "export publish"])
def test_an_export_that_is_killed_leaves_no_model_and_is_done_by_the_same_command(phase: str, straight: Path):
    expected, target = exported(straight), straight.with_name(phase)
    command = ["export", f"checkpoint={straight}", f"output={target}", "dtype=float32"]
    call = random.Random(phase).randint(1, len(expected)) if phase == "export tensor" else 1
    assert forks().start(command, fault=("at", [(0, phase, call), "kill"])).wait() == [-9]
    assert not target.exists()
    forks().run(command)
    found = load_file(target / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_teacher_cache_that_is_killed_goes_on_after_its_last_shard(root: Path):
    def command(output: str) -> list[str]:
        settings = {"teacher": root / "teacher", "output": root / output, "data.path": root / "tokens", "data.sequence_length": LENGTH}
        sizes = {"k": 8, "samples": 12, "shard_samples": 4, "teacher_check.loss_bound": "null", "teacher_check.stock_forward": "never"}
        return ["cache-teacher", *(f"{name}={value}" for name, value in {**settings, **sizes, "dtype": "float32"}.items())]

    forks().run(command("cache"))
    assert forks().start(command("killed cache"), fault=("at", [(0, "shard of a teacher cache", 2), "kill"])).wait() == [-9]
    [shard] = (root / "killed cache.tmp").glob("shard_*.safetensors")
    assert shard.name == "shard_00000.safetensors"
    written = shard.stat().st_ino
    (root / "killed cache.tmp" / "shard_00002.safetensors.tmp").write_bytes(b"half")
    forks().run(command("killed cache"))
    found, expected = ({path.name: path for path in (root / name).iterdir()} for name in ("killed cache", "cache"))
    assert found["shard_00000.safetensors"].stat().st_ino == written, "a complete shard was written again"
    assert found.keys() == expected.keys()
    for name in found.keys() - {"moe2dense.json"}:
        assert found[name].read_bytes() == expected[name].read_bytes()


@pytest.mark.parametrize("late", [1, 0])
def test_a_rank_that_stops_answering_is_named_by_the_others(late: int, root: Path, straight: Path):
    """Rank 0 holds the job's store as well: then that is what does not answer."""
    run = root / f"hung {late}"
    job = forks().start(distill(root, run, train__timeout=0.04), 2, fault=("at", [(late, "backward", 4), "stop"]))
    started = time.monotonic()
    codes = job.wait_for([1 - late])
    assert time.monotonic() - started < 60
    assert codes[1 - late] == 75
    said = job.said(1 - late)
    assert "no step ended for 2.4 s" in said
    if late == 1:
        named = re.search(
            rf"no answer from rank 1 \(process {job.ranks[1]} on \S+, last heard of after step (\d) in \S+\.py:\d+ \w+\)", said
        )
        assert named is not None, said
        assert int(named[1]) <= 3  # a heartbeat may be older than a step
    else:
        assert "store on 127.0.0.1 does not answer" in said
    assert "it continues from the last checkpoint" in said
    job.end()
    if late == 1:  # once is enough: the other end is no other
        forks().run(distill(root, run), 2)
        assert_equal(run, straight)
