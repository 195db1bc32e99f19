"""Stock transformers asked for what `serve-check` compares. Run as a script by an interpreter that has it:
ask_transformers.py REQUEST ANSWER. Reads a request (JSON) and writes the answer; nothing of this project is imported."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measures import peak_bytes, rates


def main(request_path: str, answer_path: str) -> None:
    """Load the folder, ask, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    # As plain as there is where others are compared with it; what a user gets otherwise.
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"} if request["plain"] else {}
    model = _opened(request["model"], getattr(torch, request["dtype"]), kernels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"], local_files_only=True, trust_remote_code=False)
    generated = [_greedy(model, prompt, request["new_tokens"]) for prompt in request["prompts"]]
    answer: dict[str, Any] = {
        "version": f"transformers {transformers.__version__}",
        "class": type(model).__name__,
        "tokens": [tokenizer.encode(text, add_special_tokens=False) for text in request["texts"]],
        "logprobs": [row.tolist() for row, _, _ in generated],
        "greedy": [tokens for _, tokens, _ in generated],
        "margins": [margins for _, _, margins in generated],
    }
    if request["speed"]:
        answer["speed"] = _speed(model, request["speed"])
    answer["peak_bytes"] = peak_bytes()
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _opened(folder: str, dtype: torch.dtype, kernels: dict[str, str]) -> Any:
    # Version 4 calls the type torch_dtype and has one kernel for experts.
    named = {"dtype": dtype, **kernels}
    if int(transformers.__version__.partition(".")[0]) < 5:
        named = {"torch_dtype": dtype, **{name: value for name, value in kernels.items() if name == "attn_implementation"}}
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    cls: Any = transformers.AutoModelForCausalLM
    if type(config) not in cls._model_mapping:
        cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False, **named).eval()


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], count: int) -> tuple[torch.Tensor, list[int], list[float]]:
    """Log-probabilities after the prompt [vocabulary]; greedy tokens after it; by how much each was likelier than the next best [nats]."""
    tokens = list(prompt)
    first, margins = torch.empty(0), []
    for step in range(count):
        # The whole again for every token: no cache whose correctness would be taken on trust.
        row = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].double().log_softmax(-1)
        first = row if step == 0 else first
        best, second = row.topk(2).values.tolist()
        margins.append(best - second)
        tokens.append(int(row.argmax()))
    return first, tokens[len(prompt) :], margins


@torch.no_grad()
def _speed(model: Any, speed: dict[str, Any]) -> dict[str, float]:
    """Tokens a second, the best of some runs."""

    def timed(copies: int, count: int) -> float:
        best = float("inf")
        for _ in range(speed["repeats"]):
            started = time.perf_counter()
            prompts = torch.tensor([speed["prompt"]] * copies)
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
            )
            best = min(best, time.perf_counter() - started)
        return best

    return rates(timed, speed)


if __name__ == "__main__":
    main(*sys.argv[1:])
