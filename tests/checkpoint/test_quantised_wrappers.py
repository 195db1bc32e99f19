"""Quantised language models inside models for images: quantization_config beside text_config or in it, and modules that were left as they
are, by the names that they have inside the wrapper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.cli import main
from megatron_moe2dense.families.pretrained import load_pretrained
from tests.families.every import tiny_checkpoint
from tests.helpers.quantised import fp8_blocks, from_fp8, quantised
from tests.helpers.tiny_models import write_tokens

KEPT = ("visual", "lm_head", "linear_attn", "shared_expert_gate")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
# How publishers write what they left as it was.
LISTS = {
    "regular expressions": ["re:.*visual.*", "re:.*linear_attn.*", "re:.*shared_expert_gate$", "lm_head"],
    "modules": ["model.visual", "lm_head", "model.language_model.layers.0.linear_attn", "model.language_model.layers.1.mlp.gate"],
}


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which the linear layers of the language model are in FP8."""
    root = tmp_path_factory.mktemp("wrapper")
    source = tiny_checkpoint(root / "plain", "qwen3_5_moe")
    return quantised(source, root / "fp8", lambda name, weight: fp8_blocks(name, weight, (8, 8)), FP8, skip=KEPT)


@pytest.fixture(scope="module")
def plain(wrapper: Path) -> Path:
    """What transformers makes of it."""
    return from_fp8(wrapper, wrapper.parent / "dequantised")


def with_config(wrapper: Path, directory: Path, where: str, ignored: list[str]) -> Path:
    shutil.copytree(wrapper, directory)
    content = json.loads((directory / "config.json").read_text())
    told: dict[str, Any] = {**content.pop("quantization_config"), "modules_to_not_convert": ignored}
    (content if where == "outside" else content["text_config"])["quantization_config"] = told
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("ignored", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("where", ["outside", "text_config"])
def test_it_loads_as_what_transformers_dequantises(where: str, ignored: list[str], wrapper: Path, plain: Path, tmp_path: Path):
    index = CheckpointIndex.open(with_config(wrapper, tmp_path / "model", where, ignored))
    found = load_pretrained(index, dtype=torch.bfloat16)[0].state_dict()
    wanted = AutoModelForImageTextToText.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    encoded = Values(index).encoded
    assert {found.scheme for found in encoded.values()} == {"FP8"}
    assert len(encoded) == sum(name.endswith("_scale_inv") for name in load_file(wrapper / "model.safetensors"))


@pytest.mark.parametrize("where", ["outside", "text_config"])
def test_a_module_named_by_its_place_in_the_wrapper_is_not_decoded(where: str, wrapper: Path, tmp_path: Path):
    module = "model.language_model.layers.1.self_attn.q_proj"
    for number, pattern in enumerate((module, "model.language_model.layers.1", "re:.*layers.1.self_attn.q_proj", "*layers.1.self_attn*")):
        found = Values(CheckpointIndex.open(with_config(wrapper, tmp_path / str(number), where, [pattern]))).encoded
        assert f"{module}.weight" not in found
        assert "model.language_model.layers.0.mlp.experts.0.up_proj.weight" in found


@pytest.mark.parametrize("where", ["outside", "text_config"])
def test_the_dense_result_is_that_of_the_dequantised_weights(where: str, wrapper: Path, plain: Path, tmp_path: Path):
    text, results = write_tokens(tmp_path / "text", 16 * 6, vocab=128), []
    for source in (with_config(wrapper, tmp_path / "model", where, LISTS["modules"]), plain):
        stats, dense = tmp_path / f"stats {source.name}", tmp_path / f"dense {source.name}"
        main(["calibrate", f"source={source}", f"output={stats}", f"data.path={text}", "data.sequence_length=16"])
        main(["convert", f"source={source}", f"statistics={stats}", f"output={dense}"])
        content = json.loads((dense / "config.json").read_text())
        assert "quantization_config" not in {**content, **content.get("text_config", {})}
        results.append(load_file(dense / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_plain_export_says_nowhere_that_it_is_quantised(wrapper: Path, tmp_path: Path):
    main(["export", str(with_config(wrapper, tmp_path / "model", "text_config", [])), f"output={tmp_path / 'out'}"])
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
