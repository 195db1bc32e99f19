"""A part of the student is trained as plain PyTorch trains these parameters alone; the others come out as they went in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.operations import dry_run
from megatron_moe2dense.trainer import identity, parts
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.model import ModelSpec
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny_qwen3, write_tokens
from tests.trainer.cases import distill_all
from tests.trainer.reference import LENGTH, SAMPLES, Reference, assert_same, one_step, step_config

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    parts: str | list[str]
    trains: Callable[[str], bool]
    parallel: dict[str, Any] = field(default_factory=dict)
    student: str = "student"
    muon: bool = False


def ffn(name: str) -> bool:
    return ".mlp." in name


def norms_and_head(name: str) -> bool:
    return ffn(name) or "norm" in name or name == "lm_head.weight"


WHOLE = {"distributed_optimizer": False}
ALONE = {
    "ffn": Case("ffn", ffn),
    "ffn, all recomputed": Case("ffn", ffn, {"recompute": "full"}),
    "ffn, FFNs recomputed": Case("ffn", ffn, {"recompute": "selective"}),
    "Muon": Case("ffn+norms+head", norms_and_head, WHOLE, muon=True),
    "a tied head": Case("ffn+norms+head", lambda name: norms_and_head(name) or "embed" in name, student="tied"),
}
ON_TWO = {
    "TP2 SP": Case("ffn+norms+head", norms_and_head, {"tensor": 2, "sequence": True}),
    "PP2, frozen tied embedding": Case("ffn", ffn, {"pipeline": 2}, student="tied"),
    "PP2, nothing of the second stage": Case(["model.layers.0.mlp.*"], lambda name: ".layers.0.mlp." in name, {"pipeline": 2}),
    "PP2, nothing of the first stage": Case(["*.3.mlp.down_proj.*"], lambda name: ".3.mlp.down_proj" in name, {"pipeline": 2} | WHOLE),
    "PP2, no matrix of the first stage": Case(
        ["*.3.mlp.*", "*.0.input_layernorm.*"],
        lambda name: ".3.mlp." in name or ".0.input_layernorm" in name,
        {"pipeline": 2} | WHOLE,
        muon=True,
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_qwen3(folder / "student", seed=1)
    tiny_qwen3(folder / "tied", seed=1, tie_word_embeddings=True)
    write_tokens(folder / "tokens", SAMPLES * LENGTH + 1)
    return folder


def config(root: Path, name: str, case: Case, steps: int = 1) -> dict[str, Any]:
    found = step_config(root, (case.student, None), root / name, case.parallel)
    found["train"] = {"steps": steps, "parts": case.parts}
    return found if not case.muon else {**found, "optim": {**found["optim"], "muon": {}}}


def wanted(root: Path, case: Case) -> Reference:
    return one_step(root / case.student, None, str(root / "tokens"), case.trains, case.muon)


@pytest.mark.parametrize("name", ALONE)
def test_a_step_is_that_of_plain_pytorch_with_the_rest_frozen(name: str, root: Path):
    case = ALONE[name]
    distill_all([config(root, name, case)])
    assert_same(root / name, wanted(root, case))


@pytest.mark.distributed
def test_so_it_is_on_two_ranks_and_a_stage_may_have_nothing_to_train(root: Path):
    launch(2, "tests.trainer.cases:distill_all", [config(root, name, case) for name, case in ON_TWO.items()])
    for name, case in ON_TWO.items():
        assert_same(root / name, wanted(root, case))


@pytest.mark.distributed
def test_a_run_with_frozen_parts_goes_on_as_if_it_had_not_stopped(root: Path):
    case = ON_TWO["PP2, nothing of the second stage"]
    stopped, through = (config(root, name, case, steps) for name, steps in (("stopped", 1), ("through", 2)))
    for each in (stopped, through):
        each["data"] |= {"epochs": 2}
    longer = {**stopped, "train": {**stopped["train"], "steps": 2}}
    launch(2, "tests.trainer.cases:distill_all", [stopped, longer, through])
    rows = [{row["step"]: row for row in records.read(root / name / "metrics.jsonl") if "loss" in row} for name in ("stopped", "through")]
    for key in ("loss", "grad_norm", "lr"):
        assert rows[0][2][key] == rows[1][2][key]


@pytest.mark.parametrize(
    ("patterns", "found", "do"),
    [
        (["model.layers.1.mlp.down_proj.weigth"], "matches no weight", "model.layers.1.mlp.down_proj.weight"),
        (["*.mlp.*", "nothing like it"], "nothing like it matches no weight", "the student has model.embed_tokens.weight, "),
        (["*.q_proj.weight"], "q_proj.weight without model.layers.0.self_attn.k_proj.weight", "widen the pattern"),
    ],
)
def test_a_pattern_that_can_not_be_followed_is_refused(patterns: list[str], found: str, do: str, root: Path):
    import torch

    with pytest.raises(UserError) as refused:
        parts.require(patterns, ModelSpec.read(root / "student", torch.float32))
    assert found in refused.value.found
    assert do in refused.value.do


@pytest.mark.parametrize("name", ["ffn", "Muon", "a tied head"])
def test_a_dry_run_counts_weights_alone_of_what_is_frozen(name: str, root: Path):
    raw = config(root, "sizes", ALONE[name])
    told = dry_run.facts(build(DistillConfig, {**raw, "parallel": WHOLE}, "the test"), processes=1)
    of_stage = told["memory_per_process"]["stage 0"]
    assert told["memory_bytes"]["student"] == of_stage["parameters"] + of_stage["gradients"] + of_stage["optimizer"]


def test_parts_are_of_the_identity_and_all_is_what_runs_were_before(root: Path):
    raw = config(root, "identity", ALONE["ffn"])
    assert identity.identity(build(DistillConfig, raw, "the test"))["train"]["parts"] == "ffn"
    everything = {**raw, "train": {"steps": 1}}
    assert "parts" not in identity.identity(build(DistillConfig, everything, "the test"))["train"]
    with pytest.raises(UserError, match="nothing would be trained"):
        build(DistillConfig, {**raw, "train": {"steps": 1, "parts": []}}, "the test")
    with pytest.raises(UserError, match=r"train.parts=\['model.layers.\*'\]"):  # one pattern in place of a list
        build(DistillConfig, {**raw, "train": {"steps": 1, "parts": "model.layers.*"}}, "the test")
    lists = [{**raw, "train": {"steps": 1, "parts": each}} for each in (["a.*", "b.*"], ["b.*", "a.*"])]
    first, second = (identity.identity(build(DistillConfig, each, "the test")) for each in lists)
    assert first == second
