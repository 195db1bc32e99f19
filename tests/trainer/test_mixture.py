"""A term of a mixture that is for the beginning of the run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer import distill, loop
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.losses.mixture import Mixture
from tests.trainer.runs import alone, with_student

pytestmark = pytest.mark.slow

CROSS_ENTROPY = {"method": "cross_entropy"}
TERMS = [{"weight": 1.0, "loss": CROSS_ENTROPY}, {"weight": 2.0, "loss": CROSS_ENTROPY, "until": 0.5}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_student(tmp_path_factory.mktemp("mixture"))


def run(root: Path, name: str) -> list[dict[str, Any]]:
    train = {"steps": 6, "log_every": 1, "save_every": 2}
    settings = alone(root, name, loss={"method": "mixture", "terms": TERMS}, train=train)
    distill.run(build(DistillConfig, settings, "the test"))
    return records.read(root / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def straight(root: Path) -> list[dict[str, Any]]:
    return run(root, "straight")


def test_a_term_ends_after_its_share_of_the_steps(straight: list[dict[str, Any]]):
    assert [round(row["loss"] / row["cross_entropy"], 5) for row in straight] == [3, 3, 3, 1, 1, 1]


def test_a_resumed_run_ends_it_at_the_same_step(root: Path, straight: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    measure, left = loop.student_pass, iter(range(3))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(loop, "student_pass", killed)
    with pytest.raises(KeyboardInterrupt):
        run(root, "killed")
    monkeypatch.setattr(loop, "student_pass", measure)
    assert [row["loss"] for row in run(root, "killed")] == [row["loss"] for row in straight]


def test_what_is_over_takes_no_part():
    hidden = {"weight": 1.0, "loss": {"method": "hidden_state"}}
    kl = {"weight": 1.0, "loss": {"method": "forward_kl"}}
    mixture = Mixture(terms=[{**hidden, "until": 0.25}, kl])  # type: ignore[list-item]
    assert [len(mixture.at(share).terms) for share in (0.0, 0.2, 0.25, 0.9)] == [2, 2, 1, 1]  # type: ignore[attr-defined]
    assert not Mixture(terms=[hidden, {**kl, "until": 0.5}]).trains_head(), "no gradient of the head in the second half"  # type: ignore[list-item]
    with pytest.raises(ValidationError, match="nothing would be left to train on"):
        Mixture(terms=[{**kl, "until": 0.5}])  # type: ignore[list-item]
