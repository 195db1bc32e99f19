"""One distillation step of every family, MoE teacher to dense student, in every layout, against stock transformers in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny, without_routing, write_tokens
from tests.trainer.reference import LENGTH, SAMPLES, Reference, assert_same, one_step, step_config

# Family and options of the teacher, then of the student.
PAIRS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "deepseek_v2": (("deepseek_v2", {}), ("deepseek_v2", {"first_k_dense_replace": 4})),
    "deepseek_v3": (("deepseek_v3", {}), ("deepseek_v3", {"first_k_dense_replace": 4, "v_head_dim": 8})),
    "gpt_oss": (("gpt_oss", {"hidden_size": 48}), ("gpt_oss", {"num_local_experts": 1, "num_experts_per_tok": 1, "hidden_size": 48})),
    # The stock class's embedding has no gradient for the padding token, which is a token like the others here.
    "olmoe": (("olmoe", {}), ("olmoe", {"num_experts": 1, "num_experts_per_tok": 1, "pad_token_id": None})),
    "mixtral": (("mixtral", {}), ("mistral", {"sliding_window": 6})),
    "qwen2_moe": (("qwen2_moe", {}), ("qwen2", {})),
}
# Families whose experts can not be split: tensor parallelism comes with expert parallelism.
WHOLE_EXPERTS = {"gpt_oss"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "EP2 teacher": {"expert": 2},
    "CP2": {"context": 2},
}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and tokens of all families, and all runs, one after the other on two processes."""
    root = tmp_path_factory.mktemp("families")
    write_tokens(root / "tokens", LENGTH * SAMPLES + 1)
    for name, ((teacher, of_teacher), (student, of_student)) in PAIRS.items():
        tiny(teacher, root / f"{name} teacher", seed=1, **of_teacher)
        without_routing(tiny(student, root / f"{name} student", seed=2, **of_student))
    configs = [
        step_config(root, (f"{name} student", f"{name} teacher"), root / f"{name}, {layout}", parallel | whole)
        for name in PAIRS
        for layout, parallel in LAYOUTS.items()
        for whole in ({"expert": 2} if name in WHOLE_EXPERTS and "tensor" in parallel else {},)
    ]
    launch(2, "tests.trainer.cases:distill_all", configs)
    return root


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, Reference]:
    return {name: one_step(root / f"{name} student", root / f"{name} teacher", str(root / "tokens")) for name in PAIRS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_distillation_step_equals_plain_pytorch(name: str, layout: str, root: Path, references: dict[str, Reference]):
    assert_same(root / f"{name}, {layout}", references[name])
