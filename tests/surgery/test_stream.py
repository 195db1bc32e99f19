"""The streamed forward against the stock model, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.surgery.experts import Experts
from megatron_moe2dense.surgery.observe import Observer
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.seam import MoeWatcher
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from tests.helpers.tiny_models import tiny_qwen3_moe

WINDOWS = np.random.default_rng(0).integers(0, 256, (5, 24))  # batches of 2, 2 and 1


def streamed(path: Path, statistic: str) -> list[torch.Tensor]:
    """Hidden states before layer 0 and after each layer, [5, 24, D], with batches of two windows."""
    source = MoeSource.open(path)

    with CheckpointReader(source.index) as reader:
        model = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 2))
        return [torch.cat(list(hidden)) for hidden in model.run(WINDOWS, Observer(source, [statistic]))]


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
    source, seen = MoeSource.open(tiny_qwen3_moe(tmp_path / "moe")), []

    class Watcher(MoeWatcher):
        def routed(self, layer: int, x_TD: torch.Tensor, _routing: Routing, _experts: Experts) -> torch.Tensor:
            resident = {i for i, other in enumerate(model.layers) if any(not p.is_meta for p in other.parameters())}
            assert resident == {layer}
            assert all(p.is_meta for p in model.layers[layer].mlp.experts.parameters()), "the experts are those that are watched"
            seen.append(layer)
            return x_TD

    with CheckpointReader(source.index) as reader:
        model = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 5))
        assert len(list(model.run(WINDOWS, Watcher()))) == 5
    assert seen == [0, 1, 2, 3]
    assert not [module for layer in model.layers for module in layer.modules() if "forward" in vars(module)], "stock modules are back"
