"""Generation: greedy like transformers' own, memory by hand count, rates by arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.evals.config import GenerationConfig
from megatron_moe2dense.evals.generation import Generated, greedy, peak_memory, rates, speeds
from megatron_moe2dense.evals.perplexity import Loaded
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe

PROMPTS_NS = np.random.default_rng(5).integers(0, 256, (3, 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    tiny_qwen3_moe(folder / "moe")
    tiny_qwen3(folder / "dense")
    return folder


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_tokens_are_those_of_transformers_generate(folder, name):
    model: Any = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    prompts = torch.from_numpy(PROMPTS_NS)
    found = greedy(model, prompts, 9)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert torch.equal(found.tokens_BN, expected[:, 20:])
    assert min(found.prefill_seconds, found.decode_seconds) > 0


def test_rates_count_the_prompt_once_and_the_tokens_after_the_first():
    runs = [Generated(torch.zeros(3, 11, dtype=torch.int64), prefill, decode) for prefill, decode in ((1.0, 2.0), (9.0, 9.0), (0.5, 3.0))]
    assert rates(runs, torch.zeros(3, 20)) == {"prefill_tokens_per_second": 60.0, "decode_tokens_per_second": 10.0}


def test_peak_memory_is_the_weights_and_at_least_the_cache(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    found = {length: peak_memory(model, torch.from_numpy(PROMPTS_NS[:, :length]), 4) for length in (5, 20)}
    weights = sum(parameter.numel() * 4 for parameter in model.parameters()) + sum(buffer.numel() * 4 for buffer in model.buffers())
    cache = 4 * 2 * 2 * 16 * 4  # bytes a token: layers, keys and values, heads, head size, float32
    assert found[20]["weights_bytes"] == weights
    for length, row in found.items():
        beside = row["peak_memory_bytes"] - weights
        assert 3 * length * cache < beside < 3 * length * cache + 3 * length * 64 * 4 * 40 + 3 * 256 * 4 * 4
    assert found[20]["peak_memory_bytes"] - found[5]["peak_memory_bytes"] >= 3 * 15 * cache


def test_a_row_for_each_batch(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    rows = speeds(Loaded("dense", model), PROMPTS_NS, GenerationConfig(prompt_tokens=20, new_tokens=3, batch=[1, 3], repeats=2))
    assert [(row["batch"], row["prompt_tokens"], row["new_tokens"]) for row in rows] == [(1, 20, 3), (3, 20, 3)]
    assert rows[1]["peak_memory_bytes"] > rows[0]["peak_memory_bytes"] > rows[0]["weights_bytes"]
