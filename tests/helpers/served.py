"""An engine that serves a checkpoint as vLLM does, on a port of this machine, computed by stock transformers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Engine:
    """What it serves, and how it differs from vLLM where a test wants that.

    Attributes:
        listed: of the model in the list of models, beside its name. like: `llama.cpp` says nothing of a prompt's tokens, without an error;
            `refusing` answers such a request with an error. failing: requests after which it answers none any more.
        asked: the payloads that came.
    """

    directory: Path
    name: str = "student"
    listed: dict[str, Any] = field(default_factory=lambda: {"owned_by": "vllm", "max_model_len": 256})
    like: str = "vllm"
    reads: Path | None = None
    failing: int | None = None
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.reads or self.directory)

    def get(self, path: str) -> tuple[int, Any]:
        """Status and answer."""
        if path == "/version":
            return 200, {"version": "0.0.1"}
        return (200, {"data": [{"id": self.name, **self.listed}]}) if path == "/v1/models" else (404, {"detail": "Not Found"})

    def post(self, payload: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer."""
        self.asked.append(payload)
        if self.failing is not None and len(self.asked) > self.failing:
            return 500, {"error": "out of memory"}
        if payload.get("echo") and self.like == "refusing":
            return 400, {"error": "Only no echo is supported"}
        return 200, {"choices": [{"index": i, **self._choice(prompt, payload)} for i, prompt in enumerate(payload["prompt"])]}

    @torch.inference_mode()
    def _choice(self, prompt: list[int], payload: dict[str, Any]) -> dict[str, Any]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + payload["max_tokens"] and (len(tokens) == len(prompt) or tokens[-1] != 0):
            tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if not payload.get("echo") or self.like == "llama.cpp":
            text = self.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
            for stop in payload.get("stop") or []:
                text = text.split(stop)[0]
            return {"text": text, "logprobs": {"content": []} if payload.get("logprobs") else None}
        scores_SV = torch.log_softmax(self.model(torch.tensor([tokens])).logits[0], -1)
        found = [row[token].item() for row, token in zip(scores_SV, tokens[1:], strict=False)]
        best = [{"best": row.max().item(), "own": value} for row, value in zip(scores_SV, found, strict=False)]
        return {"text": self.tokenizer.decode(tokens), "logprobs": {"token_logprobs": [None, *found], "top_logprobs": [None, *best]}}


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The address of the API while it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*engine.get(self.path))

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(*engine.post(payload))

        def _answer(self, status: int, content: Any) -> None:
            if engine.key and self.headers.get("Authorization") != f"Bearer {engine.key}":
                status, content = 401, {"error": "Unauthorized"}
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
