"""vLLM asked for what `serve-check` compares. Run as a script by an interpreter that has vLLM: ask_vllm.py REQUEST ANSWER. Reads a
request (JSON) and writes the answer; nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from measures import peak_bytes, rates


def main(request_path: str, answer_path: str) -> None:
    """Load the folder, ask, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    # One process, whose memory is what is measured; on a CPU as many threads as the reference has.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    vllm: Any = import_module("vllm")

    draft = request.get("draft")
    llm = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=request["context"],
        max_num_seqs=request["batch"],
        max_logprobs=-1,
        enforce_eager=True,
        model_impl=request.get("model_impl", "auto"),
        enable_prefix_caching=False,
        disable_log_stats=draft is None,
        seed=0,
        **({"speculative_config": _speculative(draft)} if draft else {}),
    )
    tokenizer = llm.get_tokenizer()
    greedy = vllm.SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
    every = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    answer: dict[str, Any] = {
        "version": f"vLLM {vllm.__version__}, transformers {metadata.version('transformers')}",
        "tokens": [tokenizer.encode(text, add_special_tokens=False) for text in request["texts"]],
        "logprobs": [_row(output.outputs[0].logprobs[0], request["vocabulary"]) for output in _ask(llm, request["prompts"], every)],
    }
    answer |= _written(llm, request, greedy)
    if request["speed"]:
        answer["speed"] = _speed(llm, vllm, request["speed"])
    answer["peak_bytes"] = peak_bytes()
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _speculative(draft: dict[str, Any]) -> dict[str, Any]:
    """draft: another model, and how many tokens it guesses ahead."""
    return {"method": "draft_model", "model": draft["model"], "num_speculative_tokens": draft["tokens"]}


def _written(llm: Any, request: dict[str, Any], greedy: Any) -> dict[str, Any]:
    """Greedy tokens after the prompts; the shortest time for all of them, and what a draft model guessed of them."""
    seconds, before, outputs = float("inf"), [0, 0, 0], []
    for _ in range(request.get("rounds", 1)):
        before, started = _guessed(llm, request), time.perf_counter()
        outputs = _ask(llm, request["prompts"], greedy)
        seconds = min(seconds, time.perf_counter() - started)
    passes, guessed, accepted = (after - earlier for after, earlier in zip(_guessed(llm, request), before, strict=True))
    written = {"seconds": seconds, "passes": passes, "guessed": guessed, "accepted": accepted}
    return {"greedy": [list(output.outputs[0].token_ids) for output in outputs], "written": written}


def _guessed(llm: Any, request: dict[str, Any]) -> list[int]:
    """Passes over guesses so far, tokens that the draft model has guessed for them, and those that were right."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")} if request.get("draft") else {}
    return [counts.get(f"vllm:spec_decode_num_{name}", 0) for name in ("drafts", "draft_tokens", "accepted_tokens")]


def _ask(llm: Any, prompts: list[list[int]], sampling: Any) -> Any:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


def _row(found: dict[int, Any], vocabulary: int) -> list[float]:
    """Log-probabilities of the token after the prompt, [vocabulary]."""
    return [found[token].logprob if token in found else float("-inf") for token in range(vocabulary)]


def _speed(llm: Any, vllm: Any, speed: dict[str, Any]) -> dict[str, float]:
    """Tokens a second, the best of some runs."""

    def timed(copies: int, count: int) -> float:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        best = float("inf")
        for _ in range(speed["repeats"]):
            started = time.perf_counter()
            _ask(llm, [speed["prompt"]] * copies, sampling)
            best = min(best, time.perf_counter() - started)
        return best

    return rates(timed, speed)


if __name__ == "__main__":
    main(*sys.argv[1:])
