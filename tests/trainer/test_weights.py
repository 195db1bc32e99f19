"""Hugging Face -> Megatron-Core -> Hugging Face is the identity, and both sides compute the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime
from tests.helpers.distributed import ROOT
from tests.helpers.forks import launch
from tests.helpers.quantised import as_fp8, from_fp8
from tests.helpers.tiny_models import as_mxfp4, tiny, tiny_qwen3, tiny_qwen3_moe, without_routing

pytestmark = pytest.mark.slow

PICO = ROOT / "examples/pico_moe/model"
FUSED = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3")
ROPE = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_moe": lambda path: tiny_qwen3_moe(path, dtype="bfloat16"),
    "qwen3_moe, not renormalised": lambda path: tiny_qwen3_moe(path, norm_topk_prob=False),
    "qwen3_moe, dense layers between": lambda path: tiny_qwen3_moe(path, mlp_only_layers=[1]),
    "qwen3_moe, sharded": lambda path: tiny_qwen3_moe(path, max_shard_size="200KB"),
    "qwen3": lambda path: tiny_qwen3(path, dtype="bfloat16"),
    "qwen3, tied": lambda path: tiny_qwen3(path, tie_word_embeddings=True),
    "qwen3, padded vocabulary": lambda path: tiny_qwen3(path, vocab_size=200),
    "deepseek_v2": lambda path: tiny("deepseek_v2", path),
    "deepseek_v2, low-rank queries": lambda path: tiny("deepseek_v2", path, dtype="bfloat16", q_lora_rank=24),
    "deepseek_v2, plain rotary positions": lambda path: tiny("deepseek_v2", path, rope_parameters=ROPE, rms_norm_eps=0.1),
    "deepseek_v2, YaRN without mscale": lambda path: tiny("deepseek_v2", path, rope_parameters=YARN),
    "deepseek_v2, YaRN's softmax scale alone": lambda path: tiny("deepseek_v2", path, rope_parameters={**YARN, "mscale_all_dim": 0.5}),
    "deepseek_v2, YaRN with its factor": lambda path: tiny("deepseek_v2", path, rope_parameters={**YARN, "attention_factor": 1.3}),
    "deepseek_v2, narrow values": lambda path: tiny("deepseek_v2", path, v_head_dim=8, routed_scaling_factor=1.0),
    "deepseek_v2, groups ranked by their best": lambda path: tiny("deepseek_v2", path, **GROUPS, topk_method="group_limited_greedy"),
    "deepseek_v2, dense": lambda path: tiny("deepseek_v2", path, first_k_dense_replace=4),
    "deepseek_v3": lambda path: tiny("deepseek_v3", path),
    "deepseek_v3, four active, whole queries": lambda path: tiny("deepseek_v3", path, num_experts_per_tok=4, q_lora_rank=None),
    "pico_moe": lambda path: PICO,  # noqa: ARG005
    "gpt_oss": lambda path: tiny("gpt_oss", path, dtype="bfloat16", hidden_size=48),
    "gpt_oss, one expert": lambda path: without_routing(tiny("gpt_oss", path, num_local_experts=1, num_experts_per_tok=1)),
    "olmoe": lambda path: tiny("olmoe", path, dtype="bfloat16"),
    "olmoe, one expert": lambda path: without_routing(tiny("olmoe", path, num_experts=1, num_experts_per_tok=1)),
    "mixtral": lambda path: tiny("mixtral", path, sliding_window=6),
    "mistral": lambda path: tiny("mistral", path, sliding_window=6),
    "qwen2_moe": lambda path: tiny("qwen2_moe", path, use_sliding_window=True, sliding_window=6, max_window_layers=3, mlp_only_layers=[1]),
    "qwen2": lambda path: tiny("qwen2", path, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3, windows": lambda path: tiny("qwen3", path, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3, YaRN": lambda path: tiny("qwen3", path, rope_parameters=YARN),
}
# Read, but written in another layout: as the published checkpoints are.
ALSO_READ: dict[str, Callable[[Path], Path]] = {
    **{f"{family}, fused": lambda path, family=family: tiny(family, path, save_original_format=False) for family in FUSED},
    "olmoe, fused, one expert": lambda path: tiny("olmoe", path, save_original_format=False, num_experts=1, num_experts_per_tok=1),
    "gpt_oss, one expert, routed": lambda path: tiny("gpt_oss", path, num_local_experts=1, num_experts_per_tok=1),
}


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Groups, Runtime]]:
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups, device


def load(directory: Path, place: tuple[Groups, Runtime], dtype: torch.dtype) -> tuple[models.HeadlessGPT, models.ModelSpec]:
    spec = models.ModelSpec.open(directory, dtype)
    chunks = models.build(spec, *place, PipelineLayout((spec.dims.layers,), 1))
    weights.load(chunks, spec, place[0])
    return chunks[0].eval(), spec


@pytest.mark.parametrize("name", MAKERS)
def test_there_and_back_is_the_identity(name: str, tmp_path: Path, place: tuple[Groups, Runtime]):
    directory = MAKERS[name](tmp_path / "model")
    source = {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}
    found = dict(weights.unload(*load(directory, place, next(iter(source.values())).dtype)))
    assert found.keys() == source.keys()
    for key, tensor in source.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", [*MAKERS, *ALSO_READ])
def test_logits_equal_stock_transformers(name: str, tmp_path: Path, place: tuple[Groups, Runtime]):
    directory = {**MAKERS, **ALSO_READ}[name](tmp_path / "model")
    assert_same_logits(directory, directory, place)


def assert_same_logits(directory: Path, stock_directory: Path, place: tuple[Groups, Runtime]) -> None:
    """Ours from the first, transformers' from the second; sequences are longer than the windows."""
    model, spec = load(directory, place, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(stock_directory, dtype=torch.float32)
    tokens = torch.randint(0, spec.dims.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shard = model.parallel_logits(model(tokens, torch.arange(64).expand(2, -1), None), spec.dims.vocab_size)
        expected = stock(input_ids=tokens).logits.transpose(0, 1).flatten(0, 1)
    assert (shard.logits(slice(None)) - expected).abs().max() < 1e-4


def test_mxfp4_and_its_values_are_the_same_model(tmp_path: Path, place: tuple[Groups, Runtime]):
    source = tiny("gpt_oss", tmp_path / "plain", dtype="bfloat16", intermediate_size=64)
    plain, packed = as_mxfp4(source, tmp_path / "packed")
    of_plain, of_packed = (dict(weights.unload(*load(directory, place, torch.bfloat16))) for directory in (plain, packed))
    assert of_plain.keys() == of_packed.keys()
    assert all(torch.equal(tensor, of_packed[name]) for name, tensor in of_plain.items())
    assert_same_logits(packed, plain, place)


@pytest.mark.parametrize("name", ["blocks", "scales"])
def test_a_missing_part_of_mxfp4_is_named(name: str, tmp_path: Path, place: tuple[Groups, Runtime]):
    _, packed = as_mxfp4(tiny("gpt_oss", tmp_path / "plain", dtype="bfloat16", intermediate_size=64), tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"model.layers.2.mlp.experts.down_proj_{name}"]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.experts\.down_proj"):
        load(packed, place, torch.bfloat16)


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP2 x EP2": {"tensor": 2, "expert": 2},
    "PP2": {"pipeline": 2},
}
# Same tensors as another of the table, or too large.
LEFT_OUT = ("pico_moe", "YaRN", "positions", "groups", "not renormalised", "windows", "sharded")
SPREAD = [
    (name, layout)
    for layout in LAYOUTS
    for name in MAKERS
    if not any(words in name for words in LEFT_OUT) and (name, layout) != ("gpt_oss", "TP2")  # experts with biases stay whole
]


@pytest.fixture(scope="module")
def in_layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """By checkpoint and layout ("": all on each rank): the weights in Megatron, gathered from the ranks."""
    root = tmp_path_factory.mktemp("models")
    directories = {name: MAKERS[name](root / name) for name in dict.fromkeys(name for name, _ in SPREAD)}
    cases = [*((name, "") for name in directories), *SPREAD]
    work = [(directories[name], LAYOUTS.get(layout, {})) for name, layout in cases]
    return dict(zip(cases, launch(2, "tests.trainer.cases:global_tensors", work), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "layout"), SPREAD)
def test_ranks_hold_the_parts_of_the_same_weights(name: str, layout: str, in_layouts: dict[tuple[str, str], dict[str, torch.Tensor]]):
    """Which, whole on one rank, come back as the checkpoint's bytes (above)."""
    whole, found = in_layouts[name, ""], in_layouts[name, layout]
    assert found.keys() == whole.keys()
    for key, tensor in whole.items():
        assert not tensor.isnan().any()
        assert torch.equal(found[key], tensor), key


def test_fp8_blocks_and_their_values_are_the_same_model(tmp_path: Path, place: tuple[Groups, Runtime]):
    for family in ("qwen3_moe", "deepseek_v3"):  # shared experts and latent attention too
        packed = as_fp8(tiny(family, tmp_path / family, dtype="bfloat16"), tmp_path / f"{family}_fp8")
        plain = from_fp8(packed, tmp_path / f"{family}_of_fp8")
        of_plain, of_packed = (dict(weights.unload(*load(directory, place, torch.bfloat16))) for directory in (plain, packed))
        assert of_plain.keys() == of_packed.keys()
        assert all(torch.equal(tensor, of_packed[name]) for name, tensor in of_plain.items())
        assert_same_logits(packed, plain, place)
