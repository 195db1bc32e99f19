"""Grouping, scaling, merge weights and plan.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.plan import ConversionPlan, Methods, merge_weights, plan_layer
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.types import Grouper, Grouping, Selection
from tests.surgery.test_scoring import E, random_stats

SELECTION = Selection(np.array([4, 1, 7, 2, 0]), np.array([0.1, 0.4, 0.2, 0.0, 0.5, 0.0, 0.0, 0.3]))


def flat_weights(expert: int) -> np.ndarray:
    return np.random.default_rng(expert).normal(size=30).astype(np.float32)


def test_merge_weights_are_shares_of_the_score_inside_a_group():
    weights = merge_weights(SELECTION, Grouping(np.array([0, 1, 1, 0, 2]), 3))
    assert weights.tolist() == pytest.approx([0.5 / 0.7, 0.4 / 0.7, 0.3 / 0.7, 0.2 / 0.7, 1.0])
    nothing = replace(SELECTION, scores_E=np.zeros(8))
    assert merge_weights(nothing, Grouping(np.array([0, 1, 1, 0, 2]), 3)).tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]


class Reversed(Grouper):
    """The partition of round_robin with its groups numbered backwards."""

    def needs(self) -> tuple[str, ...]:
        return ()

    def group(self, selection, weights, stats, groups) -> Grouping:
        plain = groupers["round_robin"]().group(selection, weights, stats, groups)
        return Grouping(groups - 1 - plain.group_of_K, groups)


def test_equal_partitions_give_equal_plans():
    stats = random_stats(0)
    plain, backwards = (
        plan_layer(0, stats, Methods(6, 3, scorers["sf"](), grouper, scalers["proportional"]()), flat_weights)
        for grouper in (groupers["round_robin"](), Reversed())
    )
    assert plain == backwards


def test_pure_pruning_makes_each_expert_its_own_group():
    plan = plan_layer(3, random_stats(0), Methods(E, E, scorers["do_acp"](), None, scalers["uniform"]()), flat_weights)
    assert plan.layer == 3
    assert plan.group_of == tuple(range(E))
    assert plan.merge_weights == (1.0,) * E


@pytest.fixture(scope="module")
def plan_file(moe: Path, statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plan") / "dense"
    main(["convert", f"source={moe}", f"statistics={statistics}", f"output={output}", "keep=4", "group.method=round_robin"])
    return output / "plan.json"


def test_a_plan_read_and_written_is_the_same_file(plan_file: Path, tmp_path: Path):
    plan = ConversionPlan.read(plan_file)
    plan.write(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == plan_file.read_bytes()
    content = json.loads(plan_file.read_text())
    assert content["format"] == 1
    assert (content["family"], content["keep"], content["groups"]) == ("qwen3_moe", 4, 2)
    assert content["score"] == {"method": "do_acp"}
    assert content["group"] == {"method": "round_robin", "align": "none"}
    assert content["scale"] == {"method": "uniform"}
    assert set(content["layers"][0]) == {"layer", "experts", "group_of", "merge_weights", "scales", "shared_scale", "align"}


def test_the_plan_hash_names_the_model_not_the_methods(plan_file: Path):
    plan = ConversionPlan.read(plan_file)
    assert replace(plan, score={"method": "other"}, source={**plan.source, "path": "elsewhere"}).hash() == plan.hash()
    assert replace(plan, layers=plan.layers[:-1]).hash() != plan.hash()
    assert replace(plan, source={**plan.source, "fingerprint": "0"}).hash() != plan.hash()


def broken(data: dict, change: str) -> None:
    layer = data["layers"][1]
    if change == "format":
        data["format"] = 2
    elif change == "missing":
        del layer["scales"]
    elif change == "twice":
        layer["experts"][0] = layer["experts"][1]
    elif change == "group":
        layer["group_of"] = [0, 0, 0, 0]
    elif change == "align":
        layer["align"] = "roughly"
    elif change == "unknown":
        data["colour"] = "red"
    elif change == "expert":
        layer["experts"][0] = 99
    elif change == "layers":
        data["layers"].pop()
    elif change == "source":
        data["source"]["fingerprint"] = "0" * 64


@pytest.mark.parametrize("change", ["format", "missing", "twice", "group", "align", "unknown", "expert", "layers", "source"])
def test_a_plan_that_does_not_hold_together_is_refused(
    change: str, plan_file: Path, moe: Path, tmp_path: Path, user_error: Callable[..., str]
):
    data = json.loads(plan_file.read_text())
    broken(data, change)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert "plan.json" in user_error("convert", f"source={moe}", f"plan={tmp_path / 'plan.json'}", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
