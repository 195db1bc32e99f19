"""`teacher` is a block, or a path alone; what stood beside it in earlier versions means the same run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.common.config import build, load
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.operations.plan.config import PlanConfig
from megatron_moe2dense.trainer import identity
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.config import DistillConfig, TeacherConfig
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

CHECK = {"loss_bound": None}


def run(**changes: Any) -> dict[str, Any]:
    return {"student": "s", "teacher": "t", "output": "o", "data": {"path": "p"}, "train": {"steps": 1}, **changes}


def test_old_keys_are_those_of_the_block_and_the_log_says_so(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "megatron_moe2dense"):
        old = build(DistillConfig, run(teacher_routing={"active": 4}, teacher_check=CHECK, teacher_cache=None), "the test")
    assert old == build(DistillConfig, run(teacher={"path": "t", "routing": {"active": 4}, "check": CHECK}), "the test")
    assert [record.getMessage().split()[3] for record in caplog.records] == ["teacher.routing;", "teacher.check;"]
    cached = {"loss": {"method": "top_k_kl", "k": 4}}
    beside = build(DistillConfig, run(teacher=None, teacher_cache="c", **cached), "the test")
    assert beside == build(DistillConfig, run(teacher={"cache": "c"}, **cached), "the test")
    text = {"output": "o", "data": {"path": "p"}}
    writes = build(CacheTeacherConfig, {"teacher": "t", "teacher_check": CHECK, **text}, "the test")
    assert writes == build(CacheTeacherConfig, {"teacher": {"path": "t", "check": CHECK}, **text}, "the test")
    plans = build(PlanConfig, {"student": "s", "teacher": "t", "teacher_routing": {"active": 4}}, "the test")
    assert plans.teacher is not None
    assert plans.teacher.active == 4


@pytest.mark.slow
def test_a_run_is_the_same_however_its_teacher_is_spelled_but_for_its_type(tmp_path: Path):
    """The keys are those that manifests of earlier runs have."""
    tiny_qwen3(tmp_path / "student")
    tiny_qwen3_moe(tmp_path / "teacher")
    files = {"student": str(tmp_path / "student"), "data": {"path": write_tokens(tmp_path / "tokens", 5000)}}

    def of(**changes: Any) -> dict[str, Any]:
        return identity.identity(build(DistillConfig, run(**files, **changes), "the test"))

    directory = str(tmp_path / "teacher")
    old = of(teacher=directory, teacher_routing={"active": 4}, teacher_check=CHECK)
    assert old == of(teacher={"path": directory, "routing": {"active": 4}})
    assert old["teacher_routing"] == {"active": 4}
    assert old["teacher_cache"] is None
    assert not {"teacher_check", "teacher_dtype"} & old.keys()
    assert of(teacher=directory)["teacher_routing"] is None
    assert of(teacher={"path": directory, "dtype": "fp8"}) == {**of(teacher=directory), "teacher_dtype": "fp8"}


def test_a_key_of_the_block_can_be_set_beside_a_path(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("{student: s, teacher: t, output: o, data: {path: p}, train: {steps: 1}}")
    config = load(DistillConfig, tmp_path / "run.yaml", ["teacher.dtype=fp8", "teacher.check.loss_bound=null"])
    assert config == build(DistillConfig, run(teacher={"path": "t", "dtype": "fp8", "check": CHECK}), "the test")
    assert load(DistillConfig, tmp_path / "run.yaml", ["teacher.dtype=fp8", "teacher=u"]).teacher == TeacherConfig(path="u")


@pytest.mark.parametrize(
    ("command", "teacher", "problem"),
    [
        (DistillConfig, {"teacher": {"path": "t", "routing": {"active": 2}}, "teacher_routing": {"active": 4}}, "are the same key"),
        (DistillConfig, {"teacher": {}}, "give its path, or its cache"),
        (DistillConfig, {"teacher": {"dtype": "fp8"}}, "teacher.dtype has no effect without a teacher"),
        (DistillConfig, {"teacher": {"cache": "c", "dtype": "fp8"}}, "teacher.dtype has no effect with teacher.cache"),
        (DistillConfig, {"teacher": {"path": "t", "dtype": "int4"}}, "teacher.dtype"),
        (CacheTeacherConfig, {"teacher": {"path": "t", "cache": "c"}}, "teacher.cache is what is written here"),
    ],
)
def test_a_block_that_says_nothing_or_too_much_is_refused(command: Any, teacher: dict[str, Any], problem: str):
    raw = run(**teacher) if command is DistillConfig else {"output": "o", "data": {"path": "p"}, **teacher}
    with pytest.raises(UserError) as refused:
        build(command, raw, "the test")
    assert problem in str(refused.value)
