"""A family that the surgery knows and the trainer does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.trainer.model import Blueprint
from tests.helpers.tiny_models import tiny_qwen3


def test_a_family_without_a_megatron_table_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = json.loads((tiny_qwen3(tmp_path / "model") / "config.json").read_text())
    Blueprint.of(config, "config.json", torch.float32)
    monkeypatch.setitem(FAMILIES, "qwen3", dataclasses.replace(FAMILIES["qwen3"], megatron=None, megatron_config=None))
    with pytest.raises(UserError, match=r"config\.json: qwen3, which the trainer can not build"):
        Blueprint.of(config, "config.json", torch.float32)
