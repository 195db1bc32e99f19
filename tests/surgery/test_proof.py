"""Before a dense checkpoint is written, its class has to compute what the MoE block does; widths that an engine wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.table import EXCEPTIONS, FamilyException
from megatron_moe2dense.surgery import layout, proof
from megatron_moe2dense.surgery.densify import rescaled
from megatron_moe2dense.surgery.source import MoeSource
from tests.families.every import tiny_checkpoint
from tests.helpers.tiny_models import tiny_qwen3_moe, write_tokens
from tests.surgery.conftest import calibration


def test_a_class_that_does_not_clamp_as_the_experts_do_is_found_before_anything_is_written(
    tmp_path: Path, user_error: Any, monkeypatch: pytest.MonkeyPatch
):
    """Hy4's dense layers do not: on tokens of usual size they compute the same."""
    monkeypatch.setitem(EXCEPTIONS, "hy_v4", FamilyException())
    moe = tiny_checkpoint(tmp_path / "moe", "hy_v4")
    tokens = write_tokens(tmp_path / "tokens", 65, 128)
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats")])
    arguments = ("convert", f"source={moe}", f"statistics={tmp_path / 'stats'}", f"output={tmp_path / 'dense'}", "score.method=sf")
    message = user_error(*arguments)
    assert "with constant routing layer 1 and its hy_v4 differ by 3." in message
    assert not (tmp_path / "dense").exists()
    assert not list((tmp_path / "dense.tmp").glob("*.safetensors*"))


def test_a_wrong_factor_is_found(moe: Path, monkeypatch: pytest.MonkeyPatch):
    source = MoeSource.open(moe)
    with CheckpointReader(source.index) as reader:
        assert proof.prove(source, reader, 2, 2**30) < proof.EXACT
        stored = layout.stored_ffn
        monkeypatch.setattr(proof, "stored_ffn", lambda dense, layer, ffn: stored(dense, layer, rescaled(ffn, 1.00002)))
        with pytest.raises(UserError, match=r"differ by 2\.0e-05"):
            proof.prove(source, reader, 2, 2**30)


def test_little_memory_proves_fewer_experts(moe: Path, monkeypatch: pytest.MonkeyPatch):
    source, seen = MoeSource.open(moe), []
    stored = layout.stored_ffn
    monkeypatch.setattr(proof, "stored_ffn", lambda dense, layer, ffn: seen.append(len(ffn.up_FD)) or stored(dense, layer, ffn))
    with CheckpointReader(source.index) as reader:
        for budget in (2**30, 1):
            proof.prove(source, reader, 3, budget)
    assert seen == [3 * 32, 32]


@torch.no_grad()
def test_a_width_is_padded_with_neurons_of_zeros(moe: Path, statistics: Path, tmp_path: Path):
    arguments = ["convert", f"source={moe}", f"statistics={statistics}"]
    main([*arguments, f"output={tmp_path / 'plain'}"])
    main([*arguments, f"output={tmp_path / 'padded'}", "pad_to=48"])
    assert json.loads((tmp_path / "padded/config.json").read_text())["intermediate_size"] == 96  # from 64
    plain, padded = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "padded"))
    down = "model.layers.0.mlp.down_proj.weight"
    assert padded[down][:, :64].equal(plain[down])
    assert not padded[down][:, 64:].any()
    logits = [Qwen3ForCausalLM.from_pretrained(tmp_path / name)(torch.arange(10)[None]).logits for name in ("plain", "padded")]
    torch.testing.assert_close(logits[1], logits[0])


def test_weights_beyond_float32_are_no_proof(tmp_path: Path, user_error: Any):
    moe = tiny_qwen3_moe(tmp_path / "moe")
    main(["calibrate", *calibration(moe, write_tokens(tmp_path / "tokens", 65, 128), tmp_path / "stats")])
    tensors = load_file(moe / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers.0." in name and name.endswith(("gate_up_proj", "gate_proj.weight", "up_proj.weight", "down_proj", "down_proj.weight")):
            tensor.fill_(3e38)[..., ::2, :] *= -1
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    plan = tmp_path / "stats/moe2dense.json"
    content = json.loads(plan.read_text())
    content["source"]["fingerprint"] = MoeSource.open(moe).fingerprint
    plan.write_text(json.dumps(content))
    message = user_error("convert", f"source={moe}", f"statistics={tmp_path / 'stats'}", f"output={tmp_path / 'dense'}")
    assert "layer 0 gives no finite output" in message
    assert not (tmp_path / "dense").exists()
