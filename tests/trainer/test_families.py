"""Families the surgery knows and the trainer does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.trainer.model import Blueprint
from tests.helpers.tiny_models import tiny


@pytest.mark.parametrize("family", [name for name, spec in FAMILIES.items() if spec.megatron is None] or [None])
def test_a_family_without_a_megatron_table_is_refused_by_name(family: str | None, tmp_path: Path):
    if family is None:
        assert all(spec.megatron_config is not None for spec in FAMILIES.values())
        return
    config = json.loads((tiny(family, tmp_path / "model") / "config.json").read_text())
    with pytest.raises(UserError, match=f"config.json: {family}, which the trainer can not build"):
        Blueprint.of(config, "config.json", torch.float32)
