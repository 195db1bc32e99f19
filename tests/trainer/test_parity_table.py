"""Optimizer steps of the Megatron trainer, in every layout, equal those of stock transformers models in one process."""

from __future__ import annotations

import pytest

from tests.trainer.parity import LAYOUTS, Differences, measure, write_inputs

# Adam divides by the size of a gradient, so its first steps enlarge rounding where that is small; the weights' change is 0.05 of them.
TOLERANCES = {
    "float32": Differences(loss=5e-6, gradients=1e-5, later_gradients=2e-4, weights=2e-5),
    "bfloat16": Differences(loss=2e-2, gradients=0.1, later_gradients=0.2, weights=1e-2),
}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Differences]:
    root = tmp_path_factory.mktemp("parity")
    write_inputs(root)
    return measure(root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_equal_plain_pytorch(layout: str, measured: dict[str, Differences]):
    """Loss, gradients of every tensor and weights, with a fifth of the predictions masked."""
    for name, tolerance in vars(TOLERANCES[LAYOUTS[layout].dtype]).items():
        assert getattr(measured[layout], name) < tolerance, f"{name} {measured[layout]}"
