"""Every MoE family: the streamed forward equals the stock model, hidden states of every layer, router selection and gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.surgery.experts import Experts
from megatron_moe2dense.surgery.observe import Observer
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.seam import MoeWatcher
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from tests.helpers.tiny_models import as_mxfp4, tiny

pytestmark = pytest.mark.slow

MOE = [name for name, spec in FAMILIES.items() if spec.router]
WINDOWS = np.random.default_rng(0).integers(0, 256, (3, 24))  # one batch of 2, one of 1
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in MOE),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"hidden_act": "gelu"}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": 24}),
    ("deepseek_v2", {"first_k_dense_replace": 0, "n_shared_experts": 1, "num_experts_per_tok": 3}),
    ("deepseek_v3", {"norm_topk_prob": False, "q_lora_rank": None, "topk_group": 3, "num_experts_per_tok": 4}),
    ("gpt_oss", {"num_experts_per_tok": 3, "sliding_window": 5, "swiglu_limit": 7.0}),
    ("olmoe", {"norm_topk_prob": True, "clip_qkv": 0.05, "num_key_value_heads": 4}),
    ("mixtral", {"sliding_window": 6, "num_experts_per_tok": 3, "head_dim": 8}),
    ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": [2]}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
]


def streamed(path: Path, statistic: str) -> tuple[list[torch.Tensor], dict[int, list[Routing]]]:
    """Hidden states before layer 0 and after each layer, [3, 24, D], and the routing of each MoE layer by batch."""
    source, routings = MoeSource.open(path), {}

    class Watcher(Observer):
        def routed(self, layer: int, x_TD: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
            routings.setdefault(layer, []).append(routing)
            return super().routed(layer, x_TD, routing, experts)

    with CheckpointReader(source.index) as reader:
        model = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 2))
        return [torch.cat(list(hidden)) for hidden in model.run(WINDOWS, Watcher(source, [statistic]))], routings


def stock_forward(path: Path) -> tuple[Any, Any, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """The stock model, its output with hidden states, and (gates, experts) of its routers by layer."""
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, layer in enumerate(stock.model.layers):
        for module in layer.mlp.modules():
            if type(module).__name__.endswith("Router"):
                module.register_forward_hook(lambda _module, _inputs, output, number=number: found.update({number: output[1:]}))
    return stock, stock(torch.from_numpy(WINDOWS), output_hidden_states=True), found


@pytest.mark.parametrize(("family", "config"), VARIANTS, ids=[f"{family}-{'-'.join(config) or 'plain'}" for family, config in VARIANTS])
@torch.no_grad()
def test_hidden_states_and_routing_equal_the_stock_model(family: str, config: dict[str, Any], tmp_path: Path):
    path = tiny(family, tmp_path / "moe", **config)
    stock, expected, routers = stock_forward(path)
    for statistic in ("gram", "selected_count"):  # every expert on every token; the selected ones only
        hidden, routings = streamed(path, statistic)
        assert len(hidden) == len(expected.hidden_states) == 5
        for ours, theirs in zip(hidden[:-1], expected.hidden_states[:-1], strict=True):  # stock's last one is after the final norm
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stock.lm_head(stock.model.norm(hidden[-1])), expected.logits, rtol=1e-5, atol=1e-5)
        assert_same_routing(routings, routers)


def assert_same_routing(routings: dict[int, list[Routing]], routers: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert routings.keys() == routers.keys()
    for layer, (gates, experts) in routers.items():
        order, sorted_experts = experts.argsort(dim=1), experts.sort(dim=1).values
        ours = torch.cat([routing.experts_TA for routing in routings[layer]])
        assert ours.sort(dim=1).values.equal(sorted_experts)
        our_gates = torch.cat([routing.gates_TA for routing in routings[layer]]).gather(1, ours.argsort(dim=1))
        torch.testing.assert_close(our_gates, gates.gather(1, order), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [name for name in MOE if name != "gpt_oss"])
@torch.no_grad()
def test_experts_fused_on_disk_are_the_same_model(family: str, tmp_path: Path):
    published = tiny(family, tmp_path / "published")
    fused = tiny(family, tmp_path / "fused", save_original_format=False)
    assert len(MoeSource.open(fused).expert_names(1)) == 2
    assert len(MoeSource.open(published).expert_names(1)) == 3 * MoeSource.open(published).dims.experts
    for one, other in zip(streamed(published, "gram")[0], streamed(fused, "gram")[0], strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_mxfp4_experts_are_the_model_of_their_values(tmp_path: Path):
    plain, packed = as_mxfp4(tiny("gpt_oss", tmp_path / "plain", intermediate_size=64), tmp_path / "packed")
    assert MoeSource.open(packed).values.encoded
    _, expected, _ = stock_forward(plain)
    values, blocks = streamed(plain, "gram")[0], streamed(packed, "gram")[0]
    for one, other, theirs in zip(values[:-1], blocks[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(values[-1], blocks[-1])


def test_only_one_layer_is_in_memory(tmp_path: Path):
    source, seen = MoeSource.open(tiny("qwen3_moe", tmp_path / "moe")), []

    class Watcher(MoeWatcher):
        def routed(self, layer: int, x_TD: torch.Tensor, _routing: Routing, _experts: Experts) -> torch.Tensor:
            resident = {i for i, other in enumerate(model.layers) if any(not p.is_meta for p in other.parameters())}
            assert resident == {layer}
            assert all(p.is_meta for p in model.layers[layer].mlp.experts.parameters()), "the experts are those that are watched"
            seen.append(layer)
            return x_TD

    with CheckpointReader(source.index) as reader:
        model = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 3))
        assert len(list(model.run(WINDOWS, Watcher()))) == 5
    assert seen == [0, 1, 2, 3]
    assert not [module for layer in model.layers for module in layer.modules() if "forward" in vars(module)], "stock modules are back"
