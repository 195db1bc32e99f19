"""Preallocated shards: what stock safetensors and transformers read from them, memory while reading, full disks."""

from __future__ import annotations

import errno
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.shards import ShardWriter, TensorSpec, shards_of
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import write_json
from tests.helpers.tiny_models import tiny_qwen3


def specs(index: CheckpointIndex) -> list[TensorSpec]:
    return [TensorSpec(name, info.dtype, info.shape) for name, info in index.tensors.items()]


@pytest.mark.parametrize("shard_bytes", [1, 50_000, 4 * 1024**3])
def test_stock_transformers_reads_what_is_written_in_any_order(shard_bytes: int, tmp_path: Path):
    index = CheckpointIndex.open(tiny_qwen3(tmp_path / "model", dtype="bfloat16"))
    target = tmp_path / "copy"
    target.mkdir()
    names = list(index.tensors)
    random.Random(0).shuffle(names)
    with CheckpointReader(index) as reader, ShardWriter(target, shards_of(specs(index), shard_bytes), 10_000) as writer:
        for i, name in enumerate(names):
            if i % 2:
                writer.write(name, reader.tensor(name))
            else:
                for offset, data in reader.chunks(name, 1000):
                    writer.write_bytes(name, offset, data)
        writer.finish()
    write_json(target / "config.json", index.config)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(tmp_path / "model/model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())
    files = list(target.glob("*.safetensors"))
    assert (len(files) > 1) == (target / "model.safetensors.index.json").exists() == (shard_bytes < 10**6)
    if len(files) > 1:
        whole = json.loads((target / "model.safetensors.index.json").read_text())
        assert whole["metadata"]["total_size"] == index.nbytes
        assert set(whole["weight_map"]) == set(expected)
        largest = max(tensor.nbytes for tensor in expected.values())
        assert all(sum(t.nbytes for t in load_file(path).values()) <= max(shard_bytes, largest) for path in files)


def test_tensors_of_different_width_stay_aligned(tmp_path: Path):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 3).double(),
        "c": torch.randn(7).bfloat16(),
        "d": torch.ones(()),
    }
    codes = {torch.uint8: "U8", torch.float64: "F64", torch.bfloat16: "BF16", torch.float32: "F32"}
    shards = shards_of([TensorSpec(name, codes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()])
    with ShardWriter(tmp_path, shards, 1000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    loaded = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {name: tensor.tolist() for name, tensor in tensors.items()}
    write_json(tmp_path / "config.json", {})
    for info in CheckpointIndex.open(tmp_path).tensors.values():
        assert info.start % (info.nbytes // max(1, int(np.prod(info.shape)))) == 0


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards = shards_of([TensorSpec(f"t{i}", "F32", (100,)) for i in range(50)])
    with ShardWriter(tmp_path, shards, 1200) as writer:
        for i in range(50):
            writer.write(f"t{i}", torch.full((100,), float(i)))
            assert writer._pending_bytes <= 1200
            assert len(writer._pending) <= 3
        writer.finish()
    assert all(tensor.eq(int(name[1:])).all() for name, tensor in load_file(tmp_path / "model.safetensors").items())


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_full_disk_is_a_user_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write() -> None:
        with ShardWriter(tmp_path, shards_of([TensorSpec("t", "F32", (100,))]), 10) as writer:
            writer.write("t", torch.ones(100))
            writer.mark(lambda: None)
            writer.finish()

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="No space left"):
        write()


def test_after_a_failed_write_no_mark_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reached: list[int] = []
    real, calls = os.pwrite, []

    def second_fails(*arguments: object) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", second_fails)
    shards = shards_of([TensorSpec(f"t{i}", "F32", (100,)) for i in range(4)])

    def write() -> None:
        with ShardWriter(tmp_path, shards, 10**6) as writer:
            for i in range(4):
                writer.write(f"t{i}", torch.ones(100))
                writer.mark(lambda i=i: reached.append(i))
            writer.finish()

    with pytest.raises(UserError, match="No space left"):
        write()
    assert reached == [0]


BITS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E5M2": torch.float8_e5m2}
BITS["F8_E4M3"] = torch.float8_e4m3fn


@pytest.mark.parametrize("code", sorted(BITS))
def test_exactly_the_values_that_are_not_finite_are_found(code: str, tmp_path: Path):
    dtype = BITS[code]
    special = [-0.0, 0.0, 1.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny]
    for value in [*special, float("nan"), -float("nan"), *([] if code == "F8_E4M3" else [float("inf"), -float("inf")])]:
        for place in (0, 2**20 // dtype.itemsize + 1):  # the second one beyond the first chunk of a read
            tensor = torch.zeros(place + 2, dtype=dtype)
            tensor[place] = value
            save_file({"t": tensor}, tmp_path / "model.safetensors", metadata={"format": "pt"})
            write_json(tmp_path / "config.json", {})
            with CheckpointReader(CheckpointIndex.open(tmp_path)) as reader:
                if math.isfinite(value):
                    reader.check("t")
                    reader.finite("t")
                else:
                    for read in (reader.check, reader.finite):
                        with pytest.raises(UserError, match="t has 1 NaN or infinite"):
                            read("t")
