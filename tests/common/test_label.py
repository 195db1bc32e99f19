"""Short names of method blocks."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moe2dense.common.label import label


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (None, "none"),
        ({"method": "sf"}, "sf"),
        ({"method": "anchor", "align": "none", "seed": None}, "anchor"),
        ({"method": "ols", "prefilter": 2.0, "block": 4}, "ols(prefilter=2.0, block=4)"),
        ({"method": "ridge", "reconstruct": {"epochs": 8}, "mode": "parallel"}, "ridge(reconstruct(epochs=8), mode=parallel)"),
        ({"method": "ridge", "reconstruct": {}}, "ridge(reconstruct)"),
    ],
)
def test_a_block_is_its_method_and_the_options_that_are_set(block: dict[str, Any] | None, said: str):
    assert label(block) == said
