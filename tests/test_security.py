"""What comes from elsewhere - checkpoints, indices, YAML files - is read as data: it names no other files, and runs no code."""

from __future__ import annotations

import ast
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.checkpoint.assets import copy_assets
from megatron_moe2dense.checkpoint.index import CheckpointIndex, read_header
from megatron_moe2dense.common import config, outputs
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals.models import load_model
from megatron_moe2dense.surgery.config import InspectConfig
from tests.helpers.tiny_models import tiny_qwen3


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "models/name", max_shard_size="100KB")


@pytest.mark.parametrize("place", ["../{}", "{root}/{}", "sub/../../{}", ".."])
def test_an_index_that_points_out_of_its_folder_is_refused(place: str, sharded: Path, tmp_path: Path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    (sharded / shard).rename(sharded.parent / shard)
    content["weight_map"][name] = place.format(shard, root=sharded.parent)
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"shard '.*'") as refused:
        CheckpointIndex.open(sharded)
    assert "same folder" in refused.value.expected


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_of_another_form_is_refused(content: str, sharded: Path):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        CheckpointIndex.open(sharded)


def header_of(entry: Any) -> bytes:
    text = entry if isinstance(entry, bytes) else json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


FORGED = {
    "an offset before the file": {"dtype": "F32", "shape": [6], "data_offsets": [-8, 16]},
    "an end before its beginning": {"dtype": "F32", "shape": [0], "data_offsets": [16, 8]},
    "more values than bytes": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
    "negative sizes": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
    "no place": {"dtype": "F32", "shape": [4]},
    "no tensor": [1],
    "no object": b"[1]",
    "nesting without end": b"[" * 200_000,
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_header_is_refused(what: str, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(header_of(FORGED[what]))
    with pytest.raises(UserError, match="truncated or damaged"):
        read_header(file)


def test_a_header_is_bounded_before_it_is_read(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as handle:  # sparse: takes no room
        handle.write(struct.pack("<Q", 1 << 40))
        handle.truncate((1 << 40) + 16)
    with pytest.raises(UserError, match="header of 1099511627776 bytes"):
        read_header(file)


def test_a_tokenizer_that_links_out_of_its_folder_does_not_travel(sharded: Path, tmp_path: Path):
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("key")
    target.mkdir()
    (sharded / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match="is a link to"):
        copy_assets(sharded, target)
    assert not list(target.iterdir())


def test_links_of_a_hugging_face_cache_and_inside_a_folder_are_followed(tmp_path: Path):
    blob, snapshot, target = tmp_path / "repo/blobs/0a", tmp_path / "repo/snapshots/main", tmp_path / "target"
    for folder in (blob.parent, snapshot, target):
        folder.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0a")
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    assert copy_assets(snapshot, target) == ["tokenizer.json", "vocab.json"]
    assert not any((target / name).is_symlink() for name in ("tokenizer.json", "vocab.json"))


@pytest.mark.parametrize("text", ["source: !!python/object/apply:os.system ['touch {}']", "source: !!python/name:os.system"])
def test_yaml_makes_no_objects(text: str, tmp_path: Path):
    marker = tmp_path / "it ran"
    (tmp_path / "config.yaml").write_text(text.format(marker))
    with pytest.raises(UserError, match=r"config\.yaml"):
        config.load(InspectConfig, tmp_path / "config.yaml", [])
    assert not marker.exists()


def test_json_that_nests_without_end_is_a_user_error(tmp_path: Path):
    (tmp_path / "plan.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"plan\.json"):
        outputs.read_json(tmp_path / "plan.json", "a plan")


DAMAGED: dict[str, Callable[[bytes, int], bytes]] = {
    "cut off": lambda content, _header: content[:-1],
    "longer": lambda content, _header: content + b"0",
    "a longer header": lambda content, header: struct.pack("<Q", header + 8) + content[8:],
    "a bit of the header's text": lambda content, _header: content[:9] + bytes([content[9] ^ 0x80]) + content[10:],
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_shard_is_named(how: str, sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(DAMAGED[how](content, struct.unpack("<Q", content[:8])[0]))
    with pytest.raises(UserError, match=shard.name):
        CheckpointIndex.open(sharded)
    shard.write_bytes(content)
    assert set(load_file(shard)) <= set(CheckpointIndex.open(sharded).tensors)


def test_code_that_a_model_brings_is_never_run(sharded: Path, tmp_path: Path):
    """Stock transformers would ask on the terminal whether to run it."""
    marker = tmp_path / "it ran"
    (sharded / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    content = json.loads((sharded / "config.json").read_text())
    foreign = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (sharded / "config.json").write_text(json.dumps({**content, **foreign}))
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(CheckpointIndex.open(sharded), torch.device("cpu"), "float32")
    assert not marker.exists()


def test_every_call_of_transformers_says_that_it_trusts_no_code():
    for file in (Path(__file__).resolve().parents[1] / "megatron_moe2dense").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
                said = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg == "trust_remote_code"}
                assert said == {"trust_remote_code": False}, f"{file}:{call.lineno}"
