"""Config blocks of `moe2dense eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import field_validator, model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source
from megatron_moe2dense.tokens.config import TokensConfig


class PerplexityConfig(Config):
    """Next-token negative log-likelihood on held-out tokens."""

    data: TokensConfig = key(..., "held-out tokens")
    stride: int | None = key(
        None, "a window every so many tokens, whose last so many count, the others are context; null: windows don't overlap", "tokens", gt=0
    )
    batch_tokens: int = key(4096, "tokens through a model at once: whole windows, at least one", "tokens", gt=0)

    @model_validator(mode="after")
    def _check_stride(self) -> PerplexityConfig:
        if self.stride is not None and self.stride >= self.data.sequence_length:
            raise ValueError(
                f"`stride` {self.stride} leaves no context in windows of {self.data.sequence_length}: "
                "make it smaller, or leave it out for windows that don't overlap"
            )
        return self


class KlConfig(Config):
    """KL(teacher || model), on the windows and positions of the perplexity unless `data` names others (which don't overlap)."""

    teacher: Annotated[str, Source()] = key(..., "HF directory of the teacher")
    data: TokensConfig | None = key(None, "held-out tokens; null: those of the perplexity")


@dataclass(frozen=True)
class PresetTask:
    """A task of a preset: lm-eval's name and folder, examples in the prompt, and the metric that goes into the mean."""

    task: str
    folder: str
    shots: int
    metric: str


# Tasks and shots are the paper's; it names no metrics. Those here are (ours): the length-normalised one where lm-eval has it, the choice
# of the Open LLM Leaderboard for the same tasks.
PRESETS = {
    "paper": (
        PresetTask("winogrande", "winogrande", 5, "acc"),
        PresetTask("hellaswag", "hellaswag", 10, "acc_norm"),
        PresetTask("arc_easy", "arc", 25, "acc_norm"),
        PresetTask("arc_challenge", "arc", 25, "acc_norm"),
        PresetTask("mmlu", "mmlu/default", 5, "acc"),
    )
}


class HarnessConfig(Config):
    """Accuracy on tasks of EleutherAI's lm-eval: a preset, or tasks by name or file."""

    preset: Literal["paper"] | None = key(None, "paper: WinoGrande, HellaSwag, ARC-easy, ARC-challenge, MMLU with the paper's shots")
    tasks: list[str] | None = key(None, "instead: task names of lm-eval, or paths of task YAML files", min_length=1)
    shots: int | dict[str, int] | None = key(None, "examples in the prompt, for all tasks or by task; null: the task's own", "examples")
    limit: int | None = key(None, "first so many questions of each task, for trials; null: all", "questions", gt=0)
    batch_size: int = key(8, "prompts through the model at once; scores can move with it", "prompts", gt=0)
    add_bos_token: bool | None = key(None, "begin every prompt with the tokenizer's BOS token; null: as the tokenizer does by itself")

    @model_validator(mode="after")
    def _check(self) -> HarnessConfig:
        if (self.preset is None) == (self.tasks is None):
            raise ValueError("give either `preset` or `tasks`")
        if self.tasks is None:
            if self.shots is not None:
                raise ValueError("`shots` are the preset's: leave them out, or list `tasks`")
            return self
        shots = self.shots if isinstance(self.shots, dict) else {}
        unknown, missing = sorted(set(shots) - set(self.tasks)), [task for task in self.tasks if shots and task not in shots]
        if unknown or missing:
            raise ValueError(f"`shots` must name exactly the tasks; not a task: {unknown}, without shots: {missing}")
        if min(shots.values(), default=self.shots or 0) < 0:  # type: ignore[type-var]
            raise ValueError("`shots` must not be negative")
        return self

    def chosen(self) -> list[tuple[str, int | None]]:
        """Name or path of every task, with its shots (None: the task's own)."""
        if self.preset is not None:
            return [(item.task, item.shots) for item in PRESETS[self.preset]]
        assert self.tasks is not None
        return [(name, self.shots[name] if isinstance(self.shots, dict) else self.shots) for name in self.tasks]

    def metric(self, task: str) -> str:
        """The metric that stands for `task` in tables and means: the preset's, else `acc`."""
        return next((item.metric for item in PRESETS.get(self.preset or "", ()) if item.task == task), "acc")


class GenerationConfig(Config):
    """Speed and memory of greedy generation through stock transformers."""

    data: TokensConfig | None = key(None, "tokens the prompts are cut from (windows of prompt_tokens); null: those of the perplexity")
    prompt_tokens: int = key(128, "length of a prompt", "tokens", gt=0)
    new_tokens: int = key(32, "tokens generated after each prompt", "tokens", gt=1)
    batch: list[int] = key([1, 8], "prompts at once; one measurement each", "prompts", min_length=1)
    repeats: int = key(3, "measurements after a warm-up; the median is recorded", gt=0)

    @field_validator("batch")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("`batch` holds different positive numbers")
        return value


class EndpointConfig(Config):
    """An engine that serves the model through an OpenAI-compatible API."""

    url: str = key(..., "address of the API, such as http://127.0.0.1:8000/v1", pattern=r"^https?://.+")
    model: str | None = key(None, "name that it is served by; null: the only one that is served there")
    concurrency: int = key(4, "requests at a time, each of harness.batch_size prompts or perplexity.batch_tokens", "requests", gt=0)
    timeout: int = key(300, "how long the answer to a request may take", "seconds", gt=0)


class EvalConfig(Config):
    """`moe2dense eval`."""

    models: Annotated[list[str] | dict[str, str], Source()] = key(
        ..., "HF directories, or label: directory; a label defaults to the folder's name"
    )
    output: str = key(..., "records.jsonl to write, one row a model; an unfinished run of the same config is resumed")
    perplexity: PerplexityConfig | None = key(None, "measure perplexity; null: don't")
    kl: KlConfig | None = key(None, "measure KL to a teacher, in batches of perplexity.batch_tokens; null: don't")
    harness: HarnessConfig | None = key(None, "measure accuracy with lm-eval (extra `eval`); null: don't")
    generation: GenerationConfig | None = key(None, "measure generation speed and memory; null: don't")
    endpoint: EndpointConfig | None = key(
        None, "ask an engine that serves the one model, for perplexity and lm-eval; null: stock transformers in this process"
    )
    device: str = key("auto", "torch device: cpu, cuda, cuda:1, ...; auto: cuda where there is one, else cpu")
    device_map: Literal["auto", "balanced", "sequential"] | None = key(
        None, "spread each model over all GPUs, as accelerate understands it (extra `eval`); null: one device"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "weights and compute; auto: float32 on cpu, bfloat16 on cuda; logits are compared in float32 always"
    )
    overwrite: bool = key(False, "replace an existing output")

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.perplexity is None and self.harness is None and self.generation is None:
            raise ValueError("nothing to measure: give at least one of `perplexity`, `harness`, `generation`")
        if self.generation is not None and self.generation.data is None and self.perplexity is None:
            raise ValueError("`generation` needs prompts: give `generation.data` (or `perplexity.data`)")
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"device={self.device} has no effect with device_map: remove one of the two")
        if self.kl is not None and self.perplexity is None:
            raise ValueError("`kl` goes with `perplexity`: give `perplexity.data` too")
        if not self.models:
            raise ValueError("`models` is empty")
        if self.endpoint is not None:
            self._check_endpoint()
        labels = [label for label, _ in self._labelled()]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two models are called {', '.join(twice)}; give labels: `models: {{label: directory}}`")
        return self

    def _check_endpoint(self) -> None:
        """What has no meaning, or no effect, where an engine computes."""
        if len(self.models) > 1:
            raise ValueError(f"an `endpoint` serves one model: name that one in `models` (found {len(self.models)})")
        if self.kl is not None:
            raise ValueError(
                "`kl` needs the whole distribution of every position, of which an `endpoint` tells parts: leave one of the two out"
            )
        if self.generation is not None:
            raise ValueError("`generation` times stock transformers, not an `endpoint`: leave one of the two out")
        moot = [name for name in ("device", "device_map", "dtype") if getattr(self, name) != type(self).model_fields[name].default]
        if moot:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in moot)} has no effect with `endpoint`, whose engine decides it: leave it out"
            )

    def _labelled(self) -> list[tuple[str, str]]:
        if isinstance(self.models, dict):
            return list(self.models.items())
        return [(Path(directory).resolve().name, directory) for directory in self.models]

    def directories(self) -> dict[str, str]:
        """Label to directory, in the order given."""
        return dict(self._labelled())


class MakeTaskConfig(Config):
    """`moe2dense make-task`."""

    data: str = key(..., "prefix of the .bin/.idx files with held-out tokens")
    tokenizer: Annotated[str, Source("small")] = key(..., "what they were made with: HF directory, tokenizer.json or sentencepiece .model")
    output: str = key(..., "directory for <name>.yaml and <name>.jsonl")
    name: str = key("continuation", "name of the task", pattern=r"^[A-Za-z0-9_-]+$")
    context_tokens: int = key(64, "length of a context", "tokens", gt=0)
    continuation_tokens: int = key(16, "length of the true continuation and of every distractor", "tokens", gt=0)
    choices: int = key(4, "the true continuation and its distractors", gt=1)
    distractors: Literal["document", "text"] = key("document", "where they come from: the same document (harder), or all of the text")
    questions: int = key(500, "how many questions, at most", "questions", gt=0)
    seed: int = key(0, "seed of places, distractors and order")
    overwrite: bool = key(False, "replace an existing output")
