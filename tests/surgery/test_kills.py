"""Killed with SIGKILL at random moments and started again, calibrate, convert and prune-dense end with the bytes of an undisturbed run, and
nothing that is half done ever stands in the place of an output. `MOE2DENSE_KILLS` sets how often (`make chaos`: 20)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_moe2dense.cli import main
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.surgery.conftest import calibration
from tests.surgery.kills import assert_the_same_bytes_when_killed

KILLS = int(os.environ.get("MOE2DENSE_KILLS", "5"))

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE of more layers than the others, its tokens, statistics and two plans."""
    root = tmp_path_factory.mktemp("kills")
    tiny_qwen3_moe(root / "moe", dtype="bfloat16", num_hidden_layers=12, max_shard_size="300KB")
    write_tokens(root / "tokens", 32 * 24)
    main(["calibrate", *calibration(root / "moe", str(root / "tokens"), root / "statistics")])
    for name, options in (("a", ["score.method=sf"]), ("b", ["keep=4", "group.method=round_robin"])):
        main(["convert", f"source={root / 'moe'}", f"statistics={root / 'statistics'}", f"output={root / name}", *options])
    return root


@pytest.mark.parametrize("memory_budget", ["8GiB", "1B"], ids=["in_memory", "on_disk"])
def test_a_killed_calibration_ends_with_the_same_bytes(memory_budget: str, inputs: Path, tmp_path: Path):
    arguments = calibration(inputs / "moe", str(inputs / "tokens"), tmp_path / "statistics")
    options = ["batch_tokens=128", f"memory_budget={memory_budget}"]
    assert_the_same_bytes_when_killed(["calibrate", *arguments, *options], [tmp_path / "statistics"], KILLS)


def test_a_killed_conversion_ends_with_the_same_bytes(inputs: Path, tmp_path: Path):
    arguments = [f"source={inputs / 'moe'}", f"statistics={inputs / 'statistics'}", f"output={tmp_path / 'dense'}", "shard_size=100KB"]
    assert_the_same_bytes_when_killed(["convert", *arguments], [tmp_path / "dense"], KILLS)


def test_a_killed_conversion_to_several_outputs_ends_with_the_same_bytes(inputs: Path, tmp_path: Path):
    plans = {str(tmp_path / name): str(inputs / name / "plan.json") for name in ("a", "b")}
    command = ["convert", f"source={inputs / 'moe'}", f"outputs={json.dumps(plans)}"]
    assert_the_same_bytes_when_killed(command, [Path(output) for output in plans], KILLS)


def test_a_killed_pruning_ends_with_the_same_bytes(inputs: Path, tmp_path: Path):
    source = tiny_qwen3(tmp_path / "dense", dtype="bfloat16", num_hidden_layers=12)
    target = "target={hidden_size: 48, num_hidden_layers: 10, num_attention_heads: 2, intermediate_size: 96}"
    arguments = [*calibration(source, str(inputs / "tokens"), tmp_path / "pruned"), target, "batch_tokens=128", "shard_size=100KB"]
    assert_the_same_bytes_when_killed(["prune-dense", *arguments], [tmp_path / "pruned"], KILLS)
