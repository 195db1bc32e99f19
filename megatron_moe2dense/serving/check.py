"""`moe2dense serve-check`: whether engines compute what stock transformers does in float32, and how fast."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.assets import require_tokenizer
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import versions, write_json
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.tokenized import TEXTS, own_tokenizer
from megatron_moe2dense.serving import gguf
from megatron_moe2dense.serving.compare import Row, guessed, judged, measured, refused, table
from megatron_moe2dense.serving.config import ServeCheckConfig
from megatron_moe2dense.serving.engines import NotServedError, Place, find

_LONGEST_PROMPT, _SPEED_PROMPT, _SPEED_NEW, _BATCH, _REPEATS = 64, 96, 32, 8, 2
_LLAMA_CPP = "llama_cpp"
_DRAFTING = ("vllm", _LLAMA_CPP)  # engines whose runner lets another model guess


def run(config: ServeCheckConfig) -> None:
    """Print a row an engine; write what was measured.

    Raises:
        UserError: an engine computes something else, or does not serve the model; an engine that was asked for is not there; llama.cpp's
            converter is not; the output is.
    """
    places = _require(config)
    with tempfile.TemporaryDirectory(prefix="moe2dense_serve_") as folder:
        rows = list(_rows(config, places, Path(folder)))
    print(table(rows))
    if config.output is not None:
        content = {"source": config.source, "rows": [dataclasses.asdict(row) for row in rows], "versions": versions()}
        write_json(Path(config.output), content)
    wrong = [f"{row.version or row.engine} ({row.weights}): {row.reason}" for row in rows if row.verdict in ("different", "not served")]
    if wrong:
        raise UserError(
            "; ".join(wrong),
            f"what stock transformers computes in float32 (bound {config.bound:g} nats, rounded weights: KL {config.kl_bound:g})",
            "serve it with the engines that do; docs/serving.md says what each is known to differ in",
        )


def dry_run(config: ServeCheckConfig) -> dict[str, Any]:
    """Which engines would be asked, and where each is."""
    places = _require(config)
    return {"source": config.source, "engines": {place.engine: place.program or place.interpreter for place in places}}


def _require(config: ServeCheckConfig) -> list[Place]:
    """Before anything is computed: the engines, the tools and the output."""
    if (Path(config.source) / "checkpoints").is_dir():
        raise UserError(f"{config.source} is a run of `distill`", "a Hugging Face directory", "moe2dense export it first")
    places = find(config.engines, config.python)
    if config.output is not None and Path(config.output).exists() and not config.overwrite:
        raise UserError(f"output {config.output} exists", "a path that does not exist yet", "choose another output or add overwrite=true")
    if any(place.engine == _LLAMA_CPP for place in places):
        for kind in (config.dtype, *config.quantize):
            gguf.Tools.find(config.gguf, kind)
    return places


def request(config: ServeCheckConfig, source: Path, texts: list[str], prompts: list[list[int]]) -> dict[str, Any]:
    """What every engine is asked of a model.

    Args:
        source: its Hugging Face directory. texts: to be cut into tokens. prompts: token ids [prompt][position], after which
            log-probabilities of the whole vocabulary and greedy tokens are asked for.
    """
    stock = Account.open(source).stock
    longest = max(map(len, prompts))
    context = max(longest + config.new_tokens, _SPEED_PROMPT + _SPEED_NEW) + 1
    tiled = [token for prompt in prompts for token in prompt] * _SPEED_PROMPT
    return {
        "model": str(source),
        "dtype": config.dtype,
        "texts": texts,
        "prompts": prompts,
        "vocabulary": stock.dims.vocab_size,
        "context": min(context, stock.dims.max_positions or context),
        "new_tokens": config.new_tokens,
        "ignore_eos": False,
        "threads": config.threads,
        "batch": _BATCH,
        "speed": {"prompt": tiled[:_SPEED_PROMPT], "new_tokens": _SPEED_NEW, "batch": _BATCH, "repeats": _REPEATS}
        if config.speed
        else None,
        "plain": False,
    }


def _rows(config: ServeCheckConfig, places: list[Place], folder: Path) -> Iterator[Row]:
    source = Account.open(config.source).index.directory
    require_tokenizer(source)
    tokenizer = own_tokenizer(source)
    prompts = [tokenizer.encode(text)[:_LONGEST_PROMPT] for text in TEXTS]
    asked = request(config, source, list(TEXTS), prompts)
    logger.info("stock transformers in float32, which the engines are compared with")
    reference = Place("transformers", sys.executable).ask({**asked, "dtype": "float32", "plain": True, "speed": None}, folder)
    # AutoTokenizer may take another class than the files were made for.
    reference["tokens"] = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    reference["special"] = list(tokenizer.added_tokens_decoder)
    for place, kind, ask in _models(config, places, asked, "dense", folder):
        row = Row(place.engine, reference["class"], kind)
        bounds = (config.bound, None) if kind == "float32" else (None, config.kl_bound)
        try:
            answer, own = _answer(place, ask(), folder)
            found = judged(row, reference, answer, bounds)
            yield dataclasses.replace(found, reason="; ".join(filter(None, (found.reason, own))))
        except NotServedError as error:
            yield refused(row, str(error))
    if config.moe is None:
        return
    moe = Account.open(config.moe)
    for place, kind, ask in _models(config, places, {**asked, "model": str(moe.index.directory)}, "moe", folder):
        row = Row(place.engine, type(moe.stock.model).__name__, kind)
        try:
            alone_asked = ask()
            alone, _ = _answer(place, alone_asked, folder)
            yield measured(row, alone)
            if config.draft and place.engine in _DRAFTING:
                draft = asked["model"] if place.engine != _LLAMA_CPP else str(_file(config, source, kind, folder / "draft.gguf"))
                answer = place.ask({**alone_asked, "draft": {"model": draft, "tokens": config.draft}}, folder)
                yield guessed(dataclasses.replace(row, model=f"{row.model}, {config.draft} guessed by {reference['class']}"), alone, answer)
        except NotServedError as error:
            yield dataclasses.replace(row, reason=f"not served: {error}")


def _answer(place: Place, asked: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """An engine's answer, and what it said of its own class where it ran transformers' instead, as vLLM can."""
    try:
        return place.ask(asked, folder), ""
    except NotServedError as error:
        if place.engine != "vllm":
            raise
        own = str(error)
    try:
        answer = place.ask({**asked, "model_impl": "transformers"}, folder)
    except NotServedError as error:
        raise NotServedError(f"{own}; with --model-impl transformers: {error}") from error
    return answer, f"with --model-impl transformers, as its own class says: {own}"


def _models(
    config: ServeCheckConfig, places: list[Place], asked: dict[str, Any], name: str, folder: Path
) -> Iterator[tuple[Place, str, Any]]:
    """Engine, type of the weights, and what makes its request: a file for llama.cpp is made when its turn comes."""
    for place in places:
        if place.engine != _LLAMA_CPP:
            yield place, config.dtype, lambda: asked
            continue
        for kind in (config.dtype, *config.quantize):
            yield place, kind, lambda kind=kind: {**asked, "model": str(_file(config, Path(asked["model"]), kind, folder / f"{name}.gguf"))}


def _file(config: ServeCheckConfig, source: Path, kind: str, target: Path) -> Path:
    target.unlink(missing_ok=True)
    try:
        gguf.write(source, target, kind, config.gguf)
    except UserError as error:
        raise NotServedError(error.found) from error
    return target
