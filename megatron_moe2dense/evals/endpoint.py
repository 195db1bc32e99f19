"""A model as an engine serves it: perplexity and lm-eval's questions through an OpenAI-compatible API, asked by lm-eval's own
`local-completions`, so that what is deployed is what is measured."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.content import fingerprint
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals.config import EndpointConfig, HarnessConfig
from megatron_moe2dense.evals.harness import Answers, Tasks, answer, require_harness
from megatron_moe2dense.evals.harness_lines import bars_as_lines
from megatron_moe2dense.evals.perplexity import Measured
from megatron_moe2dense.families.tokenized import own_tokenizer

_PROBE = "The meaning of 12 words."
_NOT_SAID = 2048  # lm-eval's own bound, where neither the engine nor config.json says how long a prompt may be


def require_api() -> ModuleType:
    """lm-eval's module of OpenAI-compatible APIs; UserError naming the extra when it, or what it sends requests with, is not installed."""
    require_harness()
    try:
        import aiohttp  # noqa: F401
        import requests  # noqa: F401
        import tenacity  # noqa: F401
        from lm_eval.models import openai_completions
    except ImportError as error:
        raise UserError(
            f"cannot ask an endpoint ({error})", "aiohttp, requests and tenacity, for `endpoint`", "pip install 'megatron_moe2dense[eval]'"
        ) from None
    return openai_completions


@dataclass(frozen=True)
class Endpoint:
    """An engine that answers.

    Attributes:
        directory: the folder that it serves, whose tokenizer makes the prompts.
        name: of the model in requests. engine: what serves it, with its version where it says so.
        longest: tokens of a prompt with what is generated after it.
    """

    config: EndpointConfig
    directory: Path
    name: str
    engine: str
    longest: int

    @classmethod
    def open(cls, config: EndpointConfig, index: CheckpointIndex, positions: int, scored: str | None) -> Endpoint:
        """Ask what is served there. positions: that the model was made for (0: not said). scored: what is asked for that needs
        log-probabilities of a prompt's tokens; None: nothing does.

        Raises:
            UserError: nobody answers, no such API, another model or tokenizer than that of the folder, or no log-probabilities of prompts.
        """
        require_api()
        listed = _answered(config, "models")
        model = _chosen(config, listed)
        _require_same(config, model, index)
        longest = model.get("max_model_len") or positions or _NOT_SAID
        endpoint = cls(config, index.directory, model["id"], _engine(config, model), longest)
        if scored is not None:
            endpoint._require_scores(scored)
        return endpoint

    @property
    def settings(self) -> dict[str, Any]:
        """For a record."""
        return {"url": self.config.url, "model": self.name, "engine": self.engine}

    def answers(self, config: HarnessConfig, tasks: Tasks) -> Answers:
        """All tasks, as `harness.answer`; UserError also where a request fails."""
        with self._failures():
            client = self._client(config.batch_size, config.add_bos_token)
            return answer(client, "lm-eval local-completions", self.directory, config, tasks)

    def nll(self, windows_NS: np.ndarray, batch_windows: int, stride: int | None = None) -> Measured:
        """The likelihood of the tokens of windows, int64 [N, S]: at the positions that `perplexity.measure` counts.

        Raises:
            UserError: windows longer than the engine takes, a request that fails, or sums that are not finite.
        """
        count, length = windows_NS.shape
        self.require_length(length)
        before = 1 if stride is None else length - stride
        with self._failures():
            client = self._client(batch_windows, None)
            found = client._loglikelihood_tokens([(None, window[:before], window[before:]) for window in windows_NS.tolist()])
        total = -math.fsum(score for score, _ in found)
        if not math.isfinite(total):
            do = "a needed token has probability 0, or the engine computes with too few digits: look at its weights and dtype"
            raise UserError(f"{self.config.url}: nll {total}", "a finite sum", do)
        return Measured(count * (length - before), total)

    def require_length(self, length: int) -> None:
        """UserError where windows of so many tokens do not fit, with the one that is always generated."""
        if length >= self.longest:
            raise UserError(
                f"{self.config.url}: windows of {length} tokens, and {self.longest} with what is generated",
                f"windows of {self.longest - 1} tokens at most",
                "set perplexity.data.sequence_length, or serve with a longer context (vLLM: --max-model-len)",
            )

    def _client(self, batch_size: int, add_bos_token: bool | None) -> Any:
        theirs, encode = require_api().LocalCompletionsAPI, _encoder()

        class Client(theirs):
            """lm-eval's own, that makes prompts of text as its class for models of the process does."""

            def tok_encode(
                self, string: Any, left_truncate_len: int | None = None, add_special_tokens: bool | None = None, **_: Any
            ) -> Any:
                if not isinstance(string, str):
                    return [encode(self, text, left_truncate_len=left_truncate_len) for text in string]
                return encode(self, string, add_special_tokens, left_truncate_len)

        client = Client(
            model=self.name,
            base_url=f"{_base(self.config)}/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(self.directory),
            num_concurrent=self.config.concurrency,
            batch_size=batch_size,
            max_length=self.longest,
            add_bos_token=add_bos_token,
            timeout=self.config.timeout,
        )
        client.tokenizer = own_tokenizer(self.directory)  # lm-eval takes AutoTokenizer's
        return client

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        import aiohttp
        import requests
        from lm_eval.models import api_models

        try:
            with bars_as_lines(api_models, level=logging.CRITICAL):
                yield
        except (requests.RequestException, aiohttp.ClientError, TimeoutError) as error:
            raise UserError(
                f"{self.config.url}: {type(error).__name__} {error}".rstrip(),
                f"an answer to every request within {self.config.timeout} s, at the third try",
                "look at what the engine says; lower harness.batch_size and endpoint.concurrency, or raise endpoint.timeout",
            ) from error

    def _require_scores(self, scored: str) -> None:
        """UserError where the engine gives no log-probabilities of a prompt's own tokens, or has another tokenizer."""
        client = self._client(1, None)
        prompt = client.tok_encode(_PROBE, add_special_tokens=False)
        expected = f"log-probabilities of a prompt's own tokens (`echo` with `logprobs`), for {scored}"
        do = "serve it with vLLM; of engines without them, as llama.cpp's server, only tasks that generate can be asked"
        answered = _answered(self.config, "completions", client._create_payload([prompt], generate=False), expected, do)
        try:
            (choice,) = answered["choices"]
            found = choice["logprobs"]["token_logprobs"]
            ((total, _),) = client.parse_logprobs(answered, [prompt], [1])
            text = str(choice["text"])
            complete = len(found) == len(prompt) + 1 and math.isfinite(total)
        except (LookupError, TypeError, ValueError):
            text, complete = "", False
        if not complete:
            raise UserError(f"{self.config.url}: {self.engine} gives none for a prompt of {len(prompt)} tokens", expected, do)
        wanted = client.tokenizer.decode(prompt)
        if not "".join(text.split()).startswith("".join(wanted.split())):
            raise UserError(
                f"{self.config.url} reads the tokens of {wanted!r} as {text!r}",
                f"the tokenizer of {self.directory}",
                "name the folder that is served in `models`, or the engine's port for it in `endpoint.url`",
            )


def _encoder() -> Callable[..., list[int]]:
    """How lm-eval makes tokens of text for a model of the process: with a BOS token or without, as asked or as the tokenizer does."""
    from lm_eval.models import huggingface

    return vars(huggingface.HFLM)["tok_encode"]


def _base(config: EndpointConfig) -> str:
    return config.url.rstrip("/")


def _answered(config: EndpointConfig, path: str, payload: dict[str, Any] | None = None, expected: str = "", do: str = "") -> dict[str, Any]:
    """What the API says to GET, or to POST of a payload; UserError where nobody answers or the answer is an error (`expected`, `do`)."""
    import requests

    url, token = f"{_base(config)}/{path}", os.environ.get("OPENAI_API_KEY")
    header = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = requests.request("GET" if payload is None else "POST", url, json=payload, headers=header, timeout=config.timeout)
    except requests.RequestException as error:
        raise UserError(
            f"{url}: nobody answers ({type(error).__name__}: {error})",
            "an engine that serves the model there",
            "start it (docs/operations.md, Evaluating), and look at its address and port",
        ) from error
    try:
        answered = response.json() if response.ok else None
    except requests.JSONDecodeError:
        answered = None
    if not isinstance(answered, dict):
        raise UserError(
            f"{url}: {response.status_code} {response.text[:300]}".rstrip(),
            expected or "a list of models, as OpenAI-compatible APIs have it",
            do or "give the address with its /v1; a key that the engine asks for goes into the environment, OPENAI_API_KEY",
        )
    return answered


def _chosen(config: EndpointConfig, listed: dict[str, Any]) -> dict[str, Any]:
    """Of the models that are served, the one of this name, or the only one."""
    models = {item["id"]: item for item in listed.get("data") or [] if isinstance(item, dict) and "id" in item}
    if config.model is None and len(models) == 1:
        return next(iter(models.values()))
    if config.model not in models:
        asked = "several" if config.model is None else f"no {config.model!r}"
        served = ", ".join(models) or "none"
        do = "set endpoint.model to one of them, or endpoint.url to the right engine"
        raise UserError(f"{config.url} serves {asked if models else 'no'} models: {served}", "the one to measure", do)
    return models[config.model]


def _require_same(config: EndpointConfig, model: dict[str, Any], index: CheckpointIndex) -> None:
    """UserError where the engine names a folder, as vLLM does, that is here and has other content than the model's."""
    root = Path(str(model.get("root") or ""))
    if not (root / "config.json").is_file() or root.samefile(index.directory):
        return
    if fingerprint(str(root)) != fingerprint(str(index.directory)):
        raise UserError(
            f"{config.url} serves {root} as {model['id']!r}",
            f"{index.directory}, as `models` says",
            "name the folder that is served in `models`, or the engine's port for it in `endpoint.url`",
        )


def _engine(config: EndpointConfig, model: dict[str, Any]) -> str:
    """Who serves; with the version where it is asked as vLLM's is, beside /v1."""
    owner = str(model.get("owned_by") or "unknown")
    with contextlib.suppress(UserError):
        beside = config.model_copy(update={"url": _base(config).removesuffix("/v1")})
        return f"{owner} {_answered(beside, 'version').get('version', '')}".strip()
    return owner
