"""Checkpoint index, reader and writer against safetensors and stock transformers; damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.assets import ASSETS, copy_assets
from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe


@pytest.fixture(params=["1GB", "100KB"], ids=["single", "sharded"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "model", dtype="bfloat16", max_shard_size=request.param)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors by safetensors' own loader."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_index_tells_what_safetensors_tells(checkpoint: Path):
    index, tensors = CheckpointIndex.open(checkpoint), stored(checkpoint)
    assert set(index.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = index.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == "BF16"
        assert info.file.read_bytes()[info.start : info.start + info.nbytes] == tensor.view(torch.uint8).numpy().tobytes()
    assert index.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert index.config == json.loads((checkpoint / "config.json").read_text())


def test_the_reader_gives_whole_tensors_and_slices(checkpoint: Path):
    with CheckpointReader(CheckpointIndex.open(checkpoint)) as reader:
        for name, tensor in stored(checkpoint).items():
            assert reader.tensor(name).equal(tensor)
            assert reader.finite(name).dtype == tensor.dtype
            assert reader.rows(name, 0, 3, 9).equal(tensor[3:9])
            if tensor.ndim == 2:
                assert reader.rows(name, 1, 3, 9).equal(tensor[:, 3:9])


def test_files_are_looked_for_in_the_order_of_stock_transformers(tmp_path: Path):
    """One file, saved again over shards whose index is still there, is what both read; shards alone want their index."""
    tiny_qwen3(tmp_path / "model", seed=1, max_shard_size="100KB")
    tiny_qwen3(tmp_path / "model", seed=2)
    assert (tmp_path / "model/model.safetensors").exists()
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    with CheckpointReader(CheckpointIndex.open(tmp_path / "model")) as reader:
        found = reader.tensor("model.norm.weight")
        embedding = reader.tensor("model.embed_tokens.weight")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert found.equal(stock.model.norm.weight)
    assert embedding.equal(stock.model.embed_tokens.weight)
    tiny_qwen3(tmp_path / "shards", max_shard_size="100KB")
    (tmp_path / "shards/model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"and no model\.safetensors\.index\.json"):
        CheckpointIndex.open(tmp_path / "shards")


def test_a_checkpoint_without_its_config_is_no_checkpoint(checkpoint: Path):
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        CheckpointIndex.open(checkpoint)


def test_every_byte_missing_at_the_end_is_noticed(checkpoint: Path):
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0] + 8
    for length in (0, 5, 8, 100, header - 1, header, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            CheckpointIndex.open(checkpoint)
    file.write_bytes(whole + b"0")
    with pytest.raises(UserError, match="truncated or damaged"):
        CheckpointIndex.open(checkpoint)
    file.write_bytes(whole)
    CheckpointIndex.open(checkpoint)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x10" + bytes(7) + b"no json at all!!" + bytes(8), b"version https://git-lfs"])
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, checkpoint: Path):
    sorted(checkpoint.glob("*.safetensors"))[0].write_bytes(content)
    with pytest.raises(UserError, match="truncated or damaged"):
        CheckpointIndex.open(checkpoint)


def test_missing_files_are_named(tmp_path: Path):
    path = tiny_qwen3(tmp_path / "model", max_shard_size="100KB")
    shard = sorted(path.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        CheckpointIndex.open(path)
    single = tiny_qwen3(tmp_path / "single")
    (single / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        CheckpointIndex.open(single)
    (single / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        CheckpointIndex.open(single)


def test_absent_tensors_and_other_shapes_are_refused_with_a_hint(checkpoint: Path):
    index = CheckpointIndex.open(checkpoint)
    with CheckpointReader(index) as reader, pytest.raises(UserError, match=r"did you mean 'model\.norm\.weight'"):
        reader.tensor("model.norms.weight")
    index.require_shape("model.norm.weight", (64,))
    with pytest.raises(UserError, match=r"\[64\]"):
        index.require_shape("model.norm.weight", (65,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted_and_named(value: float, tmp_path: Path):
    path = tiny_qwen3(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with CheckpointReader(CheckpointIndex.open(path)) as reader, pytest.raises(UserError, match=r"model\.norm\.weight has 1 NaN"):
        reader.finite("model.norm.weight")


def test_the_fingerprint_tells_weights_and_configs_apart_and_nothing_else(tmp_path: Path):
    paths = [tiny_qwen3_moe(tmp_path / name, **options) for name, options in (("a", {}), ("b", {}), ("c", {"seed": 1}))]
    prints = [CheckpointIndex.open(path).fingerprint() for path in paths]
    assert prints[0] == prints[1] != prints[2]
    (paths[1] / "tokenizer.json").write_text("{}")
    assert CheckpointIndex.open(paths[1]).fingerprint() == prints[0]
    config = json.loads((paths[1] / "config.json").read_text())
    (paths[1] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert CheckpointIndex.open(paths[1]).fingerprint() != prints[0]


def test_assets_travel_byte_for_byte_and_weights_do_not(checkpoint: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    for name in ASSETS:
        (checkpoint / name).write_bytes(f"\x00{name}".encode())
    assert copy_assets(checkpoint, target) == list(ASSETS)
    assert {path.name for path in target.iterdir()} == set(ASSETS)
    assert all((target / name).read_bytes() == (checkpoint / name).read_bytes() for name in ASSETS)
