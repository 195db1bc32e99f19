"""`moe2dense make-task`: a multiple-choice task for lm-eval out of held-out tokens, for where no benchmark can be downloaded (ours).
The true continuation of a context stands among spans of as many tokens from elsewhere in the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import disk_errors, output_directory
from megatron_moe2dense.evals.config import MakeTaskConfig
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.tokens.tokenizers import TextTokenizer, open_tokenizer

_SHIFTS = 8  # places tried for the border between context and continuation
_DRAWS = 64  # spans tried for the distractors of one question


def run(config: MakeTaskConfig) -> None:
    """Write `<output>/<name>.yaml` and `<name>.jsonl`; prints what to give `eval`.

    Raises:
        UserError: an output in the way, no token file or tokenizer, tokens of another tokenizer, or text for not one question.
    """
    source, tokenizer = _opened(config)
    with output_directory(Path(config.output), "make-task", config.model_dump(mode="json"), tokens=source.fingerprint()) as working:
        rows = list(questions(source, tokenizer, config))
        if not rows:
            raise UserError(
                f"{config.data}: not one question of {config.context_tokens} + {config.continuation_tokens} tokens in a document",
                "documents longer than a question, with other text to take distractors from",
                "use more text, or fewer context_tokens and continuation_tokens",
            )
        with disk_errors(working):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (working / f"{config.name}.jsonl").write_text("".join(lines), encoding="utf-8")
            (working / f"{config.name}.yaml").write_text(yaml.safe_dump(_task(config), sort_keys=False), encoding="utf-8")
    if len(rows) < config.questions:
        logger.info("%s gives %d questions, fewer than the %d asked for", config.data, len(rows), config.questions)
    print(f"{config.output}/{config.name}.yaml: {len(rows)} questions of {config.choices} choices, chance {1 / config.choices:.4f}")


def dry_run(config: MakeTaskConfig) -> dict[str, Any]:
    """What would be read and written."""
    source, tokenizer = _opened(config)
    cells = int(np.maximum(np.diff(source.document_ends, prepend=0) // _cell(config), 0).sum())
    return {
        "reads": {"tokens": len(source.tokens), "documents": len(source.document_ends), "tokenizer": str(tokenizer.file)},
        "questions_at_most": min(cells, config.questions),
        "writes": [f"{config.output}/{config.name}{suffix}" for suffix in (".yaml", ".jsonl")],
    }


def questions(source: TokenFile, tokenizer: TextTokenizer, config: MakeTaskConfig) -> Iterator[dict[str, Any]]:
    """Questions {context, choices, gold, start}, at most `config.questions`, of places that don't overlap, drawn by `config.seed`.

    Every choice continues the context with exactly `continuation_tokens` tokens when both are encoded together, so summed
    log-likelihoods compare. start: offset of the context in the token stream.
    """
    draw, length = np.random.default_rng(config.seed), _cell(config)
    starts = np.concatenate([[0], source.document_ends[:-1]])
    cells = np.concatenate([np.arange(a, b - length + 1, length) for a, b in zip(starts, source.document_ends, strict=True)] or [starts])
    found = 0
    for cell in draw.permutation(cells):
        if found == config.questions:
            return
        question = _question(int(cell), _Text(source, tokenizer), config, draw)
        if question is not None:
            found += 1
            yield question


@dataclass(frozen=True)
class _Text:
    """A token stream with its tokenizer."""

    source: TokenFile
    tokenizer: TextTokenizer

    def ids(self, start: int, count: int) -> list[int]:
        return self.source.tokens[start : start + count].astype(np.int64).tolist()

    def crosses(self, start: int, count: int) -> bool:
        """Whether a span holds the end of a document (its last token is the end-of-document one, which is no text)."""
        after = int(np.searchsorted(self.source.document_ends, start, side="right"))
        return after == len(self.source.document_ends) or start + count >= self.source.document_ends[after]

    def document(self, start: int) -> tuple[int, int]:
        """Where the document that holds `start` begins and ends."""
        ends = self.source.document_ends
        after = int(np.searchsorted(ends, start, side="right"))
        return (int(ends[after - 1]) if after else 0), int(ends[after])

    def continuation(self, context: list[int], ids: list[int]) -> str | None:
        """The text of `ids` after `context`; None where the border between them is not one that encoding their text keeps."""
        before, whole = self.tokenizer.decode(context), self.tokenizer.decode(context + ids)
        # lm-eval moves spaces at the end of a context to its continuation.
        if not whole.startswith(before) or before != before.rstrip() or not whole[len(before) :].strip():
            return None
        kept = self.tokenizer.encode(before).tolist() == context and self.tokenizer.encode(whole).tolist() == context + ids
        return whole[len(before) :] if kept else None


def _question(cell: int, text: _Text, config: MakeTaskConfig, draw: np.random.Generator) -> dict[str, Any] | None:
    """The first question that the text at `cell` allows, or None."""
    length, width = config.continuation_tokens, _cell(config)
    for start in range(cell, cell + _SHIFTS):
        context = text.ids(start, config.context_tokens)
        border = start + config.context_tokens
        true = None if text.crosses(start, config.context_tokens + length) else text.continuation(context, text.ids(border, length))
        if true is None:
            continue
        choices, (first, last) = [true], text.document(cell) if config.distractors == "document" else (0, len(text.source.tokens))
        for place in draw.integers(first, max(first + 1, last - length), _DRAWS):
            elsewhere = place + length <= cell or place >= cell + width
            if not elsewhere or text.crosses(int(place), length):
                continue
            other = text.continuation(context, text.ids(int(place), length))
            if other is not None and other not in choices:
                choices.append(other)
            if len(choices) == config.choices:
                order = draw.permutation(config.choices)
                shuffled = [choices[i] for i in order]
                return {"context": text.tokenizer.decode(context), "choices": shuffled, "gold": shuffled.index(true), "start": start}
    return None


def _cell(config: MakeTaskConfig) -> int:
    return config.context_tokens + config.continuation_tokens + _SHIFTS


def _opened(config: MakeTaskConfig) -> tuple[TokenFile, TextTokenizer]:
    source, tokenizer = TokenFile.open(config.data), open_tokenizer(config.tokenizer)
    lowest, highest = (int(source.tokens.min()), int(source.tokens.max())) if len(source.tokens) else (0, 0)
    if lowest < 0 or highest >= tokenizer.vocab_size:
        raise UserError(
            f"{config.data}: token {lowest if lowest < 0 else highest}",
            f"tokens from 0 to below {tokenizer.vocab_size}, of {tokenizer.file}",
            "name the text's own tokenizer",
        )
    return source, tokenizer


def _task(config: MakeTaskConfig) -> dict[str, Any]:
    """The task file of lm-eval. It finds data by paths from the working directory, so this one is absolute."""
    return {
        "task": config.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(config.output).resolve() / f"{config.name}.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
