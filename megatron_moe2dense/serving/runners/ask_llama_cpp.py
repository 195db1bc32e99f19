"""llama.cpp's server asked for what `serve-check` compares. Run as a script: by an interpreter that has xllamacpp, or by any that is told
of a `llama-server`: ask_llama_cpp.py REQUEST ANSWER. Reads a request (JSON) and writes the answer; nothing of this project is imported.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from measures import peak_bytes


def main(request_path: str, answer_path: str) -> None:
    """Load the GGUF, ask, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    with _server(request) as (base, facts):
        answer = {**facts, "tokens": [_tokens(base, text) for text in request["texts"]]}
        whole = _tokens(base, "a")[0]
        answer["logprobs"] = [_next_token(base, prompt, request["vocabulary"], whole) for prompt in request["prompts"]]
        answer |= _written(base, request)
        if request["speed"]:
            answer["speed"] = _speed(base, request["speed"])
        answer["peak_bytes"] = peak_bytes(facts["pid"])
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


@contextlib.contextmanager
def _server(request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server of the model; its address and facts. Numbers are kept in float32: key-value cache as well."""
    if request["program"]:
        with _program(request) as served:
            yield served
        return
    xllamacpp: Any = import_module("xllamacpp")

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.warmup = False
    params.port = _free_port()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    if request.get("draft"):
        _let_guess(params, request)
    server = xllamacpp.Server(params)
    yield server.listening_address, {"version": f"xllamacpp {xllamacpp.__version__}", "pid": "self"}


def _let_guess(params: Any, request: dict[str, Any]) -> None:
    """Another model guesses tokens ahead. Its file is not enough: without the type of speculation llama.cpp loads it and does not ask."""
    xllamacpp: Any = import_module("xllamacpp")
    draft, asked = params.speculative.draft, request["draft"]
    draft.mparams.path, draft.n_max = asked["model"], asked["tokens"]
    draft.cache_type_k = draft.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = request["threads"]
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]


@contextlib.contextmanager
def _program(request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    port = _free_port()
    flags = {
        "--model": request["model"],
        "--ctx-size": request["context"],
        "--parallel": 1,
        "--port": port,
        "--host": "127.0.0.1",
        "--cache-type-k": "f32",
        "--cache-type-v": "f32",
        "--flash-attn": "off",
        "--threads": request["threads"],
    }
    if draft := request.get("draft"):
        flags |= {"--spec-draft-model": draft["model"], "--spec-type": "draft-simple", "--spec-draft-n-max": draft["tokens"]}
        flags |= {"--spec-draft-type-k": "f32", "--spec-draft-type-v": "f32", "--spec-draft-threads": request["threads"]}
    command = [request["program"], *(str(part) for flag in flags.items() for part in flag), "--no-warmup"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
    reader.start()
    base = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                reader.join(5)
                raise SystemExit("".join(said[-40:]))
            with contextlib.suppress(OSError, urllib.error.URLError):
                _get(f"{base}/health")
                break
            time.sleep(0.1)
        build = _get(f"{base}/props").get("build_info", "")
        yield base, {"version": f"llama-server {build}", "pid": process.pid}
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310 - of this machine
        return json.load(reply)


def _post(url: str, body: dict[str, Any]) -> Any:
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=3600) as reply:  # noqa: S310
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error.read().decode(errors='replace')}") from None


def _tokens(base: str, text: str) -> list[int]:
    return _post(f"{base}/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]


def _complete(base: str, prompt: list[int], count: int, **options: Any) -> Any:
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, "return_tokens": True, "ignore_eos": True}
    return _post(f"{base}/completion", body | options)


def _written(base: str, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens after the prompts; the shortest time for all of them, and what a draft model guessed of them."""
    # Ignoring the end forbids every token that ends a text, which others do not.
    new, whole = request["new_tokens"], request.get("ignore_eos", True)
    rounds = [[_complete(base, prompt, new, ignore_eos=whole) for prompt in request["prompts"]] for _ in range(request.get("rounds", 1))]
    timings = [[reply["timings"] for reply in replies] for replies in rounds]
    accepted = sum(one.get("draft_n_accepted", 0) for one in timings[-1])
    written = {
        "seconds": min(sum(one["prompt_ms"] + one["predicted_ms"] for one in each) for each in timings) / 1000,
        "passes": sum(one["predicted_n"] for one in timings[-1]) - accepted,
        "guessed": sum(one.get("draft_n", 0) for one in timings[-1]),
        "accepted": accepted,
    }
    last = rounds[-1]
    return {"greedy": [reply["tokens"] for reply in last], "ended": [reply["stop_type"] == "eos" for reply in last], "written": written}


def _next_token(base: str, prompt: list[int], vocabulary: int, whole: int) -> list[float]:
    """Log-probabilities of the token after the prompt, [vocabulary], before any sampling."""
    # The server gives none with a token that is part of a character: one that is a whole one is made to come, which they do not show.
    reply = _complete(base, prompt, 1, n_probs=vocabulary, logit_bias=[[whole, 1e4]])
    found = [float("-inf")] * vocabulary
    for entry in reply["completion_probabilities"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def _speed(base: str, speed: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of reading a prompt and of writing, the best of some runs."""
    runs = [_complete(base, speed["prompt"], speed["new_tokens"])["timings"] for _ in range(speed["repeats"])]
    return {"prompt": max(run["prompt_per_second"] for run in runs), "decode": max(run["predicted_per_second"] for run in runs)}


if __name__ == "__main__":
    main(*sys.argv[1:])
