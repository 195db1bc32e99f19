"""Speed and memory of greedy generation through stock transformers: the prompt at once (prefill), then token by token (decode)."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_moe2dense.evals.config import GenerationConfig
from megatron_moe2dense.evals.perplexity import Loaded


@dataclass(frozen=True)
class Generated:
    """One generation. tokens_BN: int64 [B, new_tokens]; the times of the prompt's pass and of all later passes, seconds."""

    tokens_BN: torch.Tensor
    prefill_seconds: float
    decode_seconds: float


def speeds(subject: Loaded, prompts_NS: np.ndarray, config: GenerationConfig) -> list[dict[str, Any]]:
    """A row for each batch size: batch, prompt_tokens, new_tokens, prefill and decode tokens/s (of all sequences of the batch,
    median of `repeats` after a warm-up) and peak_memory_bytes (`peak_memory`). prompts_NS: int64 [N, S], N at least the largest batch."""
    rows = []
    for batch in config.batch:
        prompts_BS = torch.from_numpy(prompts_NS[:batch]).to(subject.model.device)
        memory = peak_memory(subject.model, prompts_BS, config.new_tokens)  # also the warm-up
        runs = [greedy(subject.model, prompts_BS, config.new_tokens) for _ in range(config.repeats)]
        rows.append(
            {"batch": batch, "prompt_tokens": prompts_BS.shape[1], "new_tokens": config.new_tokens, **rates(runs, prompts_BS), **memory}
        )
    return rows


def rates(runs: list[Generated], prompts_BS: torch.Tensor) -> dict[str, float]:
    """Median tokens/s of the runs; the first new token comes out of the prompt's pass, so decode counts the others."""
    later = runs[0].tokens_BN.numel() - len(prompts_BS)
    return {
        "prefill_tokens_per_second": prompts_BS.numel() / statistics.median(run.prefill_seconds for run in runs),
        "decode_tokens_per_second": later / statistics.median(run.decode_seconds for run in runs),
    }


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts_BS: torch.Tensor, new_tokens: int) -> Generated:
    """Continue int64 [B, S] by `new_tokens` most probable tokens each, with the KV cache; an end token does not stop it."""
    start = _now(prompts_BS.device)
    output = model(input_ids=prompts_BS, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1].argmax(-1, keepdim=True).to(prompts_BS.device)]
    middle = _now(prompts_BS.device)
    for _ in range(new_tokens - 1):
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True).to(prompts_BS.device))
    return Generated(torch.cat(tokens, 1), middle - start, _now(prompts_BS.device) - middle)


def peak_memory(model: PreTrainedModel, prompts_BS: torch.Tensor, new_tokens: int) -> dict[str, int]:
    """weights_bytes (parameters and buffers) and peak_memory_bytes: those and the most that one generation allocates beside them.

    On CUDA by the caching allocator's own count over all GPUs, on a CPU from the allocations that torch's profiler records.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    allocated = _allocated_on_cuda if prompts_BS.is_cuda else _allocated_on_cpu
    return {"weights_bytes": weights, "peak_memory_bytes": weights + allocated(model, prompts_BS, new_tokens)}


def _allocated_on_cuda(model: PreTrainedModel, prompts_BS: torch.Tensor, new_tokens: int) -> int:
    devices, before = range(torch.cuda.device_count()), []
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
        before.append(torch.cuda.memory_allocated(device))
    greedy(model, prompts_BS, new_tokens)
    return sum(torch.cuda.max_memory_allocated(device) - start for device, start in zip(devices, before, strict=True))


def _allocated_on_cpu(model: PreTrainedModel, prompts_BS: torch.Tensor, new_tokens: int) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        greedy(model, prompts_BS, new_tokens)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: Any = profile.profiler.kineto_results.events()
    alive, most = 0, 0
    # Allocations and releases in order; the profiler's tables only add them up by operator.
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def _now(device: torch.device) -> float:
    """Seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
