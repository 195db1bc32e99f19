"""Config blocks of `moe2dense eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.tokens.config import TokensConfig


class PerplexityConfig(Config):
    """Next-token negative log-likelihood on held-out tokens."""

    data: TokensConfig = key(..., "held-out tokens")
    batch_tokens: int = key(4096, "tokens through a model at once: whole windows, at least one", "tokens", gt=0)


class KlConfig(Config):
    """KL(teacher || model), on the same windows as the perplexity unless `data` names others."""

    teacher: str = key(..., "HF directory of the teacher")
    data: TokensConfig | None = key(None, "held-out tokens; null: those of the perplexity")


class HarnessConfig(Config):
    """Accuracy on tasks of EleutherAI's lm-eval."""

    tasks: list[str] = key(..., "task names of lm-eval, or paths of task YAML files", min_length=1)
    shots: int | dict[str, int] | None = key(None, "examples in the prompt, for all tasks or by task; null: the task's own", "examples")
    limit: int | None = key(None, "first so many questions of each task, for trials; null: all", "questions", gt=0)
    batch_size: int = key(8, "prompts through the model at once; scores can move with it", "prompts", gt=0)

    @model_validator(mode="after")
    def _check_shots(self) -> HarnessConfig:
        shots = self.shots if isinstance(self.shots, dict) else {}
        unknown, missing = sorted(set(shots) - set(self.tasks)), [task for task in self.tasks if shots and task not in shots]
        if unknown or missing:
            raise ValueError(f"`shots` must name exactly the tasks; not a task: {unknown}, without shots: {missing}")
        if min(shots.values(), default=self.shots or 0) < 0:  # type: ignore[type-var]
            raise ValueError("`shots` must not be negative")
        return self


class EvalConfig(Config):
    """`moe2dense eval`."""

    models: list[str] | dict[str, str] = key(..., "HF directories, or label: directory; a label defaults to the folder's name")
    output: str = key(..., "records.jsonl to write, one row a model; an unfinished run of the same config is resumed")
    perplexity: PerplexityConfig | None = key(None, "measure perplexity; null: don't")
    kl: KlConfig | None = key(None, "measure KL to a teacher, in batches of perplexity.batch_tokens; null: don't")
    harness: HarnessConfig | None = key(None, "measure accuracy with lm-eval (extra `eval`); null: don't")
    device: str = key("cpu", "torch device: cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "weights and compute; logits are compared in float32 always")
    overwrite: bool = key(False, "replace an existing output")

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.perplexity is None and self.harness is None:
            raise ValueError("nothing to measure: give `perplexity`, `harness` or both")
        if self.kl is not None and self.perplexity is None:
            raise ValueError("`kl` goes with `perplexity`: give `perplexity.data` too")
        if not self.models:
            raise ValueError("`models` is empty")
        labels = [label for label, _ in self._labelled()]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two models are called {', '.join(twice)}; give labels: `models: {{label: directory}}`")
        return self

    def _labelled(self) -> list[tuple[str, str]]:
        if isinstance(self.models, dict):
            return list(self.models.items())
        return [(Path(directory).resolve().name, directory) for directory in self.models]

    def directories(self) -> dict[str, str]:
        """Label to directory, in the order given."""
        return dict(self._labelled())
