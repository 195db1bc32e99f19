"""Checkpoints larger than memory: spilled, shared and resumed calibrations, conversions under a budget, several plans, full disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.resume import Resume
from megatron_moe2dense.surgery.stats import STATISTICS, CalibratedStats
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny_qwen3
from tests.surgery.cases import PRUNED, SELECTED
from tests.surgery.conftest import SEQUENCE, calibration

pytestmark = pytest.mark.slow

BATCHES = f"batch_tokens={3 * SEQUENCE}"  # 20 windows in batches of 3: the last one has 2


def stats_bytes(directory: Path) -> bytes:
    return (directory / "stats.safetensors").read_bytes()


def test_hidden_states_are_the_same_in_memory_and_on_disk(tmp_path: Path):
    batches = [torch.randn(2, 3, 4) for _ in range(2)] + [torch.randn(1, 3, 4)]
    for name, budget in (("memory", 10**6), ("disk", 239)):  # 5 x 3 x 4 float32 are 240 bytes
        place = HiddenPlace(tmp_path, budget, name)
        states = HiddenStates((5, 3, 4), torch.float32, 2, place)
        assert states.spills == (name == "disk")
        for layer in range(3):
            for i, batch in enumerate(batches):
                states.put(i, batch + layer if layer == 0 else states[i] + 1)
            states.advance(layer)
            states.forget_others()
            again = HiddenStates((5, 3, 4), torch.float32, 2, place, layer) if layer else states
            for found in (states, again):
                assert all(torch.equal(x, b + layer) for x, b in zip(found, batches, strict=True)) or layer > 1
        assert [path.name for path in tmp_path.glob(f"{name}-*")] == [f"{name}-00002.bin"]


def test_spilling_gives_the_same_bytes(moe: Path, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spilled = []
    create = HiddenStates._create
    monkeypatch.setattr(HiddenStates, "_create", lambda self, path: spilled.append(self.spills) or create(self, path))
    for name, budget in (("memory", "1GiB"), ("disk", "1B")):
        main(["calibrate", *calibration(moe, tokens, tmp_path / name), BATCHES, f"memory_budget={budget}"])
    assert stats_bytes(tmp_path / "memory") == stats_bytes(tmp_path / "disk")
    assert spilled == [False] * 4 + [True] * 5
    assert [path.name for path in sorted((tmp_path / "disk").iterdir())] == ["moe2dense.json", "stats.safetensors"]


@pytest.mark.distributed
def test_two_ranks_with_half_the_data_each_give_the_statistics_and_the_pruned_model_of_one(moe: Path, tokens: str, tmp_path: Path):
    main(["calibrate", *calibration(moe, tokens, tmp_path / "one"), BATCHES])
    arguments = [item for item in calibration(moe, tokens, tmp_path / "two") if not item.startswith("output")]
    pruning = [*calibration(tiny_qwen3(tmp_path / "dense"), tokens, tmp_path / "pruned_by_one"), BATCHES, PRUNED]
    main(["prune-dense", *pruning])
    main(["select", *arguments, BATCHES, f"statistics={tmp_path / 'one'}", f"output={tmp_path / 'selected_by_one'}", SELECTED])
    refused = launch(2, "tests.surgery.cases:calibrate_on_two_ranks", [*arguments, BATCHES], str(tmp_path))
    one, two = CalibratedStats.open(tmp_path / "one"), CalibratedStats.open(tmp_path / "straight")
    for layer, stats in one.layers.items():
        for name in STATISTICS:
            tolerance = 1e-12 if name in ("tokens", "selected_count") else 1e-6
            np.testing.assert_allclose(two.layers[layer][name], stats[name], rtol=tolerance, err_msg=name)
    assert stats_bytes(tmp_path / "spilled") == stats_bytes(tmp_path / "resumed") == stats_bytes(tmp_path / "straight")
    assert (tmp_path / "selected/plan.json").read_bytes() == (tmp_path / "selected_by_one/plan.json").read_bytes()
    for name in ("model.safetensors", "kept.json", "config.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "pruned_by_one" / name).read_bytes()
    assert len(refused) == 4
    assert all("overwrite" in message for message in refused[::2])
    assert all("one batch for every process" in message for message in refused[1::2])


class InterruptedRunError(Exception):
    pass


def interrupt_after(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_layer = Resume.finish_layer

    def interrupted(self: Resume, done: int, *rest: object) -> None:
        finish_layer(self, done, *rest)  # type: ignore[arg-type]
        if done == layer:
            raise InterruptedRunError

    monkeypatch.setattr(Resume, "finish_layer", interrupted)


def test_a_resumed_calibration_reads_only_the_layers_that_are_left(moe: Path, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["calibrate", *calibration(moe, tokens, tmp_path / "stats"), BATCHES]
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(InterruptedRunError):
            main(arguments)
    read: list[str] = []
    whole = CheckpointReader._whole
    monkeypatch.setattr(CheckpointReader, "_whole", lambda self, name, check: read.append(name) or whole(self, name, check))
    main([*arguments, "memory_budget=1B"])  # the budget says nothing about the result, so it may change
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"2", "3"}
    main(["calibrate", *calibration(moe, tokens, tmp_path / "whole"), BATCHES])
    assert stats_bytes(tmp_path / "stats") == stats_bytes(tmp_path / "whole")


def test_the_state_of_other_tokens_is_not_taken_up(moe: Path, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prefix = str(tmp_path / "text")
    for end in (".bin", ".idx"):
        Path(prefix + end).write_bytes(Path(tokens + end).read_bytes())
    arguments = ["calibrate", *calibration(moe, prefix, tmp_path / "stats"), BATCHES]
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(InterruptedRunError):
            main(arguments)
    changed = bytearray(Path(prefix + ".bin").read_bytes())
    changed[0] ^= 1
    Path(prefix + ".bin").write_bytes(bytes(changed))
    with pytest.raises(SystemExit):
        main(arguments)
    main([*arguments, "overwrite=true"])
    main(["calibrate", *calibration(moe, prefix, tmp_path / "whole"), BATCHES])
    assert stats_bytes(tmp_path / "stats") == stats_bytes(tmp_path / "whole")


def test_bfloat16_computes_the_router_in_float32(moe: Path, tokens: str, statistics: Path, tmp_path: Path):
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats"), "dtype=bfloat16"])
    exact = CalibratedStats.open(statistics)
    for layer, stats in CalibratedStats.open(tmp_path / "stats").layers.items():
        # Probabilities of a softmax in bfloat16 would add up to 1 within 1e-3 only.
        assert stats["prob_sum"].sum() == pytest.approx(stats.tokens, rel=1e-6)
        np.testing.assert_allclose(stats["prob_sum"], exact.layers[layer]["prob_sum"], rtol=0.02)
        scale = np.abs(exact.layers[layer]["gram"]).max()
        np.testing.assert_allclose(stats["gram"], exact.layers[layer]["gram"], atol=0.03 * scale)


PLANS = (["score.method=sf"], ["keep=5", "groups=3", "group.method=round_robin", "scale.method=proportional"])


@pytest.fixture
def planned(moe: Path, statistics: Path, tmp_path: Path) -> list[Path]:
    """Two dense checkpoints, each from a run of its own with a plan."""
    for number, options in enumerate(PLANS):
        main(["convert", f"source={moe}", f"statistics={statistics}", f"output={tmp_path / f'made{number}'}", *options])
    return [tmp_path / f"made{number}" for number in range(len(PLANS))]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "moe2dense.json"}


def test_several_plans_in_one_pass_give_the_bytes_of_separate_runs(moe: Path, planned: list[Path], tmp_path: Path):
    outputs = {str(tmp_path / f"together{number}"): str(made / "plan.json") for number, made in enumerate(planned)}
    main(["convert", f"source={moe}", f"outputs={json.dumps(outputs)}"])
    for output, made in zip(outputs, planned, strict=True):
        assert files(Path(output)) == files(made)
        main(["convert", f"source={moe}", f"plan={made / 'plan.json'}", f"output={output}", "overwrite=true"])
        assert files(Path(output)) == files(made)


def test_every_weight_is_looked_at_once_however_many_plans(moe: Path, planned: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checked: list[str] = []
    check = CheckpointReader.check
    monkeypatch.setattr(CheckpointReader, "check", lambda self, name: checked.append(name) or check(self, name))
    outputs = {str(tmp_path / f"together{number}"): str(made / "plan.json") for number, made in enumerate(planned)}
    main(["convert", f"source={moe}", f"outputs={json.dumps(outputs)}"])
    assert sorted(checked) == sorted(name for name in load_file(moe / "model.safetensors") if ".mlp." in name)


@pytest.mark.parametrize("size", ["100KB", "4GiB"])
def test_sharded_and_single_outputs_load_in_stock_transformers(size: str, moe: Path, statistics: Path, planned: list[Path], tmp_path: Path):
    arguments = [f"source={moe}", f"plan={planned[0] / 'plan.json'}", f"output={tmp_path / 'dense'}", f"shard_size={size}"]
    main(["convert", *arguments])
    shards = sorted((tmp_path / "dense").glob("*.safetensors"))
    assert (len(shards) > 1) == (size == "100KB")
    model, info = Qwen3ForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(planned[0] / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_budget_too_small_for_one_layer_is_refused(
    moe: Path, statistics: Path, planned: list[Path], tmp_path: Path, user_error: Callable[..., str]
):
    arguments = ["convert", f"source={moe}", f"plan={planned[0] / 'plan.json'}", f"output={tmp_path / 'dense'}"]
    message = user_error(*arguments, "memory_budget=1MB")
    assert "memory_budget=1000000 bytes" in message
    needed = int(message.split("at least ")[1].split(":")[0])
    main([*arguments, f"memory_budget={needed}"])
    assert "no size" in user_error(*arguments, "memory_budget=much")


def test_outputs_beside_what_they_replace_are_refused(moe: Path, planned: list[Path], tmp_path: Path, user_error: Callable[..., str]):
    outputs = json.dumps({str(tmp_path / "x"): str(planned[0] / "plan.json")})
    arguments = ["convert", f"source={moe}", f"outputs={outputs}"]
    assert "output or outputs" in user_error(*arguments, f"output={tmp_path / 'y'}")
    assert "output or outputs" in user_error("convert", f"source={moe}", f"plan={planned[0] / 'plan.json'}")
    for extra in ("score.method=sf", "keep=3", "groups=2", f"plan={planned[0] / 'plan.json'}"):
        assert f"outputs and {extra.partition('=')[0].partition('.')[0]}" in user_error(*arguments, extra)
    main(arguments)
    assert "overwrite" in user_error(*arguments)


@pytest.fixture
def refused_by_a_full_disk(
    request: pytest.FixtureRequest, user_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Runs a command that must end as a UserError because a system call works so often only, then there is no room."""
    call, calls = request.param
    real, left = getattr(os, call), [calls]

    def limited(*arguments: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    def run(*arguments: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, limited)
            assert "No space left" in user_error(*arguments)

    return run


@pytest.mark.parametrize(
    "refused_by_a_full_disk", [("posix_fallocate", 0), ("pwrite", 7), ("fdatasync", 2), ("fsync", 3)], ids=lambda it: it[0], indirect=True
)
def test_a_full_disk_leaves_the_old_dense_checkpoint(refused_by_a_full_disk: Callable[..., None], moe: Path, planned: list[Path]):
    arguments = ["convert", f"source={moe}", f"plan={planned[1] / 'plan.json'}", f"output={planned[0]}", "overwrite=true"]
    before = files(planned[0])
    refused_by_a_full_disk(*arguments)
    assert files(planned[0]) == before
    main(arguments)
    assert files(planned[0]) == files(planned[1])


@pytest.mark.parametrize("refused_by_a_full_disk", [("posix_fallocate", 1), ("fsync", 4)], ids=lambda it: it[0], indirect=True)
def test_a_full_disk_leaves_the_old_statistics(refused_by_a_full_disk: Callable[..., None], moe: Path, tokens: str, tmp_path: Path):
    arguments = ["calibrate", *calibration(moe, tokens, tmp_path / "stats"), "memory_budget=1B"]
    main([*arguments, "statistics=[gate_sum]"])
    before = stats_bytes(tmp_path / "stats")
    refused_by_a_full_disk(*arguments, "overwrite=true")
    assert stats_bytes(tmp_path / "stats") == before
    main([*arguments, "overwrite=true"])
    assert stats_bytes(tmp_path / "stats") != before
