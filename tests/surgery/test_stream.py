"""The streamed forward against the stock model, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.surgery.experts import MoeWeights
from megatron_moe2dense.surgery.observe import Observation
from megatron_moe2dense.surgery.routing import route
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from tests.helpers.tiny_models import tiny_qwen3_moe

WINDOWS = np.random.default_rng(0).integers(0, 256, (5, 24))  # batches of 2, 2 and 1


def streamed(path: Path, statistic: str) -> list[torch.Tensor]:
    """Hidden states before layer 0 and after each layer, [5, 24, D], with batches of two windows."""
    source = MoeSource.open(path)

    def forward(layer: int, x_TD: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        return Observation(x_TD, route(x_TD, weights.router, source.router, source.dims.active), weights, [statistic]).output()

    with CheckpointReader(source.index) as reader:
        model = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 2))
        return [torch.cat(list(hidden)) for hidden in model.run(WINDOWS, forward)]


@pytest.mark.parametrize(
    "config",
    [{}, {"norm_topk_prob": False, "num_experts_per_tok": 3}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"hidden_act": "gelu"}],
    ids=["plain", "not_renormalised", "a_dense_layer", "every_second_layer", "gelu"],
)
@pytest.mark.parametrize("statistic", ["gram", "selected_count"])  # every expert on every token; the selected ones only
@torch.no_grad()
def test_streamed_hidden_states_and_logits_equal_the_stock_model(config: dict[str, Any], statistic: str, tmp_path: Path):
    path = tiny_qwen3_moe(tmp_path / "moe", **config)
    stock = AutoModelForCausalLM.from_pretrained(path)
    expected = stock(torch.from_numpy(WINDOWS), output_hidden_states=True)
    found = streamed(path, statistic)
    assert len(found) == len(expected.hidden_states) == 5
    for ours, theirs in zip(found[:-1], expected.hidden_states[:-1], strict=True):  # stock's last one is after the final norm
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock.lm_head(stock.model.norm(found[-1])), expected.logits, rtol=1e-5, atol=1e-5)


def test_only_one_layer_is_in_memory(tmp_path: Path):
    source = MoeSource.open(tiny_qwen3_moe(tmp_path / "moe"))

    def forward(layer: int, x_TD: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        resident = {name.split(".")[1] for name, p in model._base.named_parameters() if name.startswith("layers") and not p.is_meta}
        resident |= {str(i) for i, other in enumerate(model._layers) if any(not p.is_meta for p in other.parameters())}
        assert resident == {str(layer)}
        return x_TD

    with CheckpointReader(source.index) as reader:
        model = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 5))
        assert len(list(model.run(WINDOWS, forward))) == 5
    assert not [name for layer in model._layers for name, module in layer.named_modules() if hasattr(module, "_experts")]
