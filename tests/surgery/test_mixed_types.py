"""Checkpoints whose tensors have several types: what is made of them loses nothing, and has the types that were foretold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense.cli import main
from tests.families.every import tiny_checkpoint
from tests.helpers.tiny_models import write_tokens
from tests.surgery.test_left_out import with_tensors

pytestmark = pytest.mark.slow

EXPERT = "model.layers.2.mlp.experts"


def converted(moe: Path, tokens: str) -> dict[str, torch.Tensor]:
    """All experts kept, so that none is left out by chance."""
    data = [f"data.path={tokens}", "data.sequence_length=16"]
    main(["calibrate", f"source={moe}", f"output={moe}_statistics", *data])
    main(["convert", f"source={moe}", f"statistics={moe}_statistics", f"output={moe}_dense", "keep=8", "groups=8"])
    return load_file(f"{moe}_dense/model.safetensors")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", f"{EXPERT}.7.up_proj.weight"),  # of one expert, and not of the first
        ("qwen3_moe", f"{EXPERT}.0.down_proj.weight"),
        ("mistral4", f"{EXPERT}.gate_up_proj"),  # of all experts
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dense_ffn_has_the_widest_type_of_what_it_is_made_of(model_type: str, name: str, dtype: torch.dtype, tmp_path: Path):
    tokens = write_tokens(tmp_path / "text", 64, vocab=128)
    stored = load_file(tiny_checkpoint(tmp_path / "plain", model_type) / "model.safetensors")[name].to(dtype)
    with_tensors(tmp_path / "plain", **{name: stored.float()})
    with_tensors(tiny_checkpoint(tmp_path / "mixed", model_type), **{name: stored})
    expected, found = (converted(tmp_path / folder, tokens) for folder in ("plain", "mixed"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        widest = torch.float64 if dtype == torch.float64 and "layers.2.mlp" in key else torch.float32
        assert found[key].dtype == widest, key
        torch.testing.assert_close(found[key].float(), tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float16, torch.float8_e4m3fn])
def test_what_is_looked_up_with_is_whole_numbers(dtype: torch.dtype, tmp_path: Path, user_error: Callable[..., str]):
    tokens = write_tokens(tmp_path / "text", 64, vocab=128)
    moe = tiny_checkpoint(tmp_path / "moe", "deepseek_v4")
    tensors = load_file(moe / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int64)
    arguments = ("calibrate", f"source={moe}", "data.sequence_length=16", f"data.path={tokens}", f"output={tmp_path}")
    main([*arguments[:-1], f"{arguments[-1]}/as int64"])
    save_file({**tensors, name: tensors[name].to(dtype)}, moe / "model.safetensors", {"format": "pt"})
    again = [*arguments[:-1], f"{arguments[-1]}/again"]
    if dtype.is_floating_point:
        assert f"{name} is F" in user_error(*again)
        return
    main(again)
    found, expected = (load_file(tmp_path / folder / "stats.safetensors") for folder in ("again", "as int64"))
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    assert json.loads((tmp_path / "again/moe2dense.json").read_text())["status"] == "finished"
