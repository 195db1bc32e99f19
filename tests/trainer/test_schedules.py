"""The learning rate over a run, against the formulas of the schedules written out here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import DistillConfig

STEPS, PEAK = 50, 3e-4
FALL = {  # what is left of the way from the peak to the final rate, at a share x of the decay
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "exponential": lambda x: 2 * 0.5**x - 1,
}


def config(schedule: dict[str, Any], steps: int = STEPS) -> DistillConfig:
    settings = {"student": "-", "teacher": None, "output": "-", "data": {"path": "-"}, "optim": {"lr": PEAK}}
    return build(DistillConfig, {**settings, "train": {"steps": steps}, "schedule": schedule}, "the test")


def rates(schedule: dict[str, Any], steps: int = STEPS) -> list[float]:
    """The learning rate of each step, as the training loop asks for it."""
    runtime.cpu.install()
    from megatron_moe2dense.trainer.optim import learning_rate

    optimizer: Any = SimpleNamespace(param_groups=[{}])
    scheduler, found = learning_rate(config(schedule, steps), steps, steps, optimizer), []
    for _ in range(steps):
        scheduler.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def expected(warmup: int, start: int, final: float, fall: Any) -> list[float]:
    """Linear to the peak in `warmup` steps, then the peak, then from step `start` down."""
    values = []
    for step in range(1, STEPS + 1):
        if step <= warmup:
            values.append(PEAK * step / warmup)
        else:
            left = fall((step - start) / (STEPS - start)) if step > start else 1.0
            values.append(PEAK * (final + (1 - final) * left))
    return values


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_cosine_and_linear_fall_from_the_end_of_the_warm_up(style: str):
    assert rates({"style": style, "warmup": 0.1, "final": 0.05}) == pytest.approx(expected(5, 5, 0.05, FALL[style]), rel=1e-12)


@pytest.mark.parametrize("shape", FALL)
def test_wsd_is_stable_until_its_decay(shape: str):
    found = rates({"style": "wsd", "warmup": 0.1, "final": 0.0, "decay": 0.3, "shape": shape})
    assert found == pytest.approx(expected(5, 35, 0.0, FALL[shape]), rel=1e-12, abs=1e-18)
    assert found[5:35] == [PEAK] * 30


def test_the_defaults_of_wsd_are_the_last_fifth_and_one_minus_square_root():
    assert rates({"style": "wsd", "warmup": 0.1}) == pytest.approx(expected(5, 40, 0.1, FALL["minus_sqrt"]), rel=1e-12)


def test_a_constant_schedule_stays_at_its_peak():
    assert rates({"style": "constant", "warmup": 0.1}) == pytest.approx([PEAK * step / 5 for step in range(1, 6)] + [PEAK] * 45)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_warm_up_as_long_as_a_short_run_ends_with_it(steps: int):
    found = rates({"style": "cosine", "warmup": 0.9}, steps)
    assert len(found) == steps
    assert all(0 < rate <= PEAK for rate in found)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"style": "cosine", "decay": 0.1}, "decay and shape have no effect with style: cosine"),
        ({"style": "constant", "shape": "linear"}, "decay and shape have no effect with style: constant"),
        ({"style": "constant", "final": 0.1}, "final has no effect with style: constant"),
        ({"style": "wsd", "warmup": 0.5, "decay": 0.6}, "warmup 0.5 and decay 0.6 are more than the whole run"),
        ({"style": "wsd", "shape": "step"}, "schedule.shape"),
    ],
)
def test_a_setting_of_another_schedule_is_refused(schedule: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config(schedule)
