"""The frozen experts' short forward pass against Megatron's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime.experts import PlainExperts
from tests.helpers.tiny_models import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_without_gradients_the_outputs_are_those_of_megatrons_own_pass(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any):
    """Unequal numbers of rows, none for two experts; GPT-OSS's biased, clamped experts take that pass itself."""
    directory = tiny(family, tmp_path / "model")
    spec = models.ModelSpec.of(CheckpointIndex.open(directory).config, str(directory), dtype)
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        model = models.build(spec, groups, device, PipelineLayout((spec.dims.layers,), 1))[0]
        experts: Any = next(module for module in model.modules() if isinstance(module, PlainExperts))
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        counts = torch.tensor([0, 5, 1, 0, *(range(2, experts.num_local_experts - 2))])
        rows, weights = torch.randn(int(counts.sum()), experts.config.hidden_size, dtype=dtype), torch.rand(int(counts.sum()))
        with torch.no_grad():
            expected, _ = SequentialMLP.forward(experts, rows, counts, weights)
            if family == "qwen3_moe":
                monkeypatch.setattr(SequentialMLP, "forward", lambda *_: pytest.fail("not the short pass"))
            found, bias = experts(rows, counts, weights)
    assert bias is None
    torch.testing.assert_close(found, expected, rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=0 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_stock_transformers(family: str, tmp_path: Path):
    """Of a MoE that is trained, with biases in its experts and without."""
    directory = tiny(family, tmp_path / "model")
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(directory)
    stock(input_ids=tokens).logits.square().mean().backward()
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        spec = models.ModelSpec.open(directory, torch.float32)
        chunks = models.build(spec, groups, device, PipelineLayout((spec.dims.layers,), 1))
        weights.load(chunks, spec, groups)
        model = chunks[0].eval()
        shard = model.parallel_logits(model(tokens, torch.arange(24).expand(2, -1), None), spec.dims.vocab_size)
        shard.logits(slice(None)).square().mean().backward()
    found: Any = model.embedding.word_embeddings.weight.grad
    expected: Any = stock.get_input_embeddings().weight.grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
