"""GPTQ against its definition, number by number: AutoGPTQ's pack (auto_gptq/nn_modules/qlinear), and GPTQModel's second format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.encoded import assert_exactly, values

INPUTS, OUTPUTS, SIZE = 128, 64, 32


def packed(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Numbers [N, M] along the first axis, one bit after the other, in words of 32."""
    stream = ((numbers[:, None] >> np.arange(bits)[None, :, None]) & 1).reshape(-1, numbers.shape[1])
    words = (stream.reshape(-1, 32, numbers.shape[1]).astype(np.uint32) << np.arange(32, dtype=np.uint32)[None, :, None]).sum(1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "desc_act"])
def test_columns_of_numbers_with_a_group_for_each_input(bits: int, form: str, ordered: bool, tmp_path: Path):
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 1 << bits, (INPUTS, OUTPUTS))
    zeros = generator.integers(0, 1 << bits, (INPUTS // SIZE, OUTPUTS))  # 0 too, which the first format stores as all ones
    scales = generator.random((INPUTS // SIZE, OUTPUTS)).astype(np.float16)
    group = np.arange(INPUTS) // SIZE
    group = group if ordered else generator.permutation(group)
    stored = (zeros - 1) % (1 << bits) if form == "gptq" else zeros
    wanted = (numbers - zeros[group]).astype(np.float32) * scales.astype(np.float32)[group]
    parts = {
        "qweight": packed(numbers, bits),
        "qzeros": packed(stored.T, bits).T,
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    config: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": SIZE, "desc_act": not ordered, "checkpoint_format": form}
    assert_exactly(values(tmp_path, parts, config), torch.from_numpy(wanted.T.copy()))


@pytest.mark.parametrize(
    "other", [{"checkpoint_format": "marlin"}, {"bits": 5}, {"dynamic": {"+:.*down_proj": {"bits": 8}}}, {"group_size": 64}]
)
def test_other_forms_decode_nothing(other: dict[str, Any], tmp_path: Path):
    parts = {
        "qweight": torch.zeros(INPUTS // 8, OUTPUTS, dtype=torch.int32),
        "qzeros": torch.zeros(INPUTS // SIZE, OUTPUTS // 8, dtype=torch.int32),
        "scales": torch.ones(INPUTS // SIZE, OUTPUTS).half(),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": SIZE}
    assert values(tmp_path, parts, config).encoded
    assert not values(tmp_path, parts, {**config, **other}).encoded
