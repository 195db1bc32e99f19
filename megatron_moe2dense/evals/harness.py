"""Accuracy on benchmark tasks through the library of EleutherAI's lm-eval (extra `eval`)."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import constants
from transformers import PreTrainedModel

from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals.config import PRESETS, HarnessConfig
from megatron_moe2dense.evals.harness_lines import bars_as_lines
from megatron_moe2dense.families.tokenized import own_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: lm-eval's manager, its Task and Group objects by number of shots (None: each task's own), how many questions each
    task asks, and which are scored by log-probabilities (the others by generated text)."""

    manager: Any
    by_shots: dict[int | None, list[Any]]
    questions: dict[str, int]
    scored: list[str]


@dataclass(frozen=True)
class Answers:
    """What lm-eval found for a model.

    Attributes:
        by_task: every metric (`acc`, `acc_norm`, ...: fractions) with shots and the task's version; a group's own row for a group.
        settings: backend, whether prompts began with a BOS token, and the longest prompt in tokens.
    """

    by_task: dict[str, dict[str, Any]]
    settings: dict[str, Any]

    def accuracy(self, config: HarnessConfig) -> dict[str, float]:
        """The metric that stands for each task (`HarnessConfig.metric`), where it has that one."""
        found = {task: values.get(config.metric(task)) for task, values in self.by_task.items()}
        return {task: value for task, value in found.items() if value is not None}


def require_harness() -> ModuleType:
    """The lm_eval package; UserError naming the extra when it is not installed."""
    _make_room_for_data_sets()
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"no lm-eval ({error})", "lm-eval, for the `harness` block", "pip install 'megatron_moe2dense[eval]'") from None
    return lm_eval


@functools.cache
def _make_room_for_data_sets() -> None:
    """`datasets` copies what it reads below HOME, files of this machine too. Where HOME can't be written and it has nothing there, its
    cache, which it looks up when it is imported, is a temporary folder."""
    if not {"HF_HOME", "HF_DATASETS_CACHE"}.isdisjoint(os.environ):
        return
    cache = Path(constants.HF_HOME) / "datasets"
    there = next(folder for folder in (cache, *cache.parents) if os.path.exists(folder))  # noqa: PTH110 - False where it may not look
    # A path that is not absolute begins with the ~ of a user without a home.
    if there == cache or (cache.is_absolute() and os.access(there, os.W_OK)):
        return
    folder = tempfile.mkdtemp(prefix="moe2dense_datasets_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["HF_DATASETS_CACHE"] = folder
    logger.info("%s can't be written: the data of tasks is kept in %s until the end; HF_HOME names a place that stays", cache, folder)


def load_tasks(config: HarnessConfig, ranks: Ranks) -> Tasks:
    """Load the tasks and their data, before any model. HF_HUB_OFFLINE and HF_DATASETS_OFFLINE are respected (by `datasets`).

    Raises:
        UserError: an unknown task, data that can't be had, `shots` for a task that fixes them to 0, or fewer questions than processes.
    """
    manager = task_manager(config)
    by_shots: dict[int | None, list[Any]] = {}
    questions: dict[str, int] = {}
    scored: list[str] = []
    for name, shots in config.chosen():
        if name not in manager.task_index and not Path(name).is_file():
            hint = did_you_mean(name, manager.all_tasks) or "lm-eval lists its tasks with `lm_eval ls tasks`"
            raise UserError(f"task {name!r}", "a task of lm-eval or the path of a task YAML file", hint)
        try:
            loaded = manager.load([name])
        except Exception as error:  # data sets and task code raise anything, all of it the task's
            raise UserError(
                f"task {name}: {type(error).__name__}: {error}",
                "a task whose data can be loaded",
                "check the task's file and the network; without one, load the data once where there is one and bring its cache (HF_HOME), "
                "or measure a local task file (`moe2dense make-task`)",
            ) from error
        fixed = [task for task, item in loaded["tasks"].items() if shots and item.get_config("num_fewshot") == 0]
        if fixed:
            raise UserError(f"shots {shots} for {fixed[0]}, which fixes them to 0", "shots with an effect", "leave them out for it")
        for task, item in loaded["tasks"].items():
            questions[task] = _asked(task, len(list(item.eval_docs)), config.limit, ranks)
            if item.OUTPUT_TYPE != "generate_until":
                scored.append(task)
        top = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
        by_shots.setdefault(shots, []).extend(top)
    return Tasks(manager, by_shots, questions, scored)


def _asked(task: str, questions: int, limit: int | None, ranks: Ranks) -> int:
    """How many questions; UserError for a process that would have nothing to answer: lm-eval's others would wait for it for ever."""
    asked = questions if limit is None else min(questions, limit)
    if asked < ranks.world:
        raise UserError(
            f"task {task}: {asked} questions for {ranks.world} processes",
            "at least one for every process",
            "start fewer processes, or raise harness.limit",
        )
    return asked


def task_manager(config: HarnessConfig) -> Any:
    """lm-eval's TaskManager with no more than it needs: reading all of lm-eval's own tasks takes ten seconds."""
    tasks = require_harness().tasks
    if config.preset is not None:
        folders = sorted({str(Path(tasks.__file__).parent / item.folder) for item in PRESETS[config.preset]})
        return tasks.TaskManager(include_defaults=False, include_path=folders)
    return tasks.TaskManager(include_defaults=not all(name.endswith(".yaml") for name, _ in config.chosen()))


def require_tokenizer(directory: Path) -> None:
    """UserError when a model directory has no tokenizer (transformers makes an empty one up)."""
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{directory} has none of {', '.join(_TOKENIZER_FILES)}",
            "a tokenizer beside the weights, for the `harness` block",
            "copy the source model's tokenizer there",
        )


def in_process(model: PreTrainedModel, directory: Path, config: HarnessConfig, ranks: Ranks) -> Any:
    """`model` with the tokenizer that `directory` describes as lm-eval asks it; each process answers a share, and the first knows all (the
    others find no tasks)."""
    lm_eval = require_harness()
    tokenizer = own_tokenizer(directory)
    logger.info("%s: text to tokens by %s", directory, type(tokenizer).__name__)
    with bars_as_lines():
        return _shared(lm_eval.models.huggingface.HFLM, ranks)(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            device=str(model.device),
            backend="causal",
            add_bos_token=config.add_bos_token,
        )


def answer(asked: Any, backend: str, directory: Path, config: HarnessConfig, tasks: Tasks) -> Answers:
    """Put all tasks to `asked`, a model of lm-eval's with the tokenizer in `directory`. backend: what it is, for the record.

    Raises:
        UserError: `add_bos_token=true` for a tokenizer that adds none.
    """
    lm_eval = require_harness()
    rows: dict[str, dict[str, Any]] = {}
    settings = {"backend": backend, **_settings(asked, config, directory)}
    with bars_as_lines():
        for shots, items in tasks.by_shots.items():
            found = lm_eval.simple_evaluate(
                model=asked,
                tasks=items,
                task_manager=tasks.manager,
                num_fewshot=shots,
                limit=config.limit,
                log_samples=False,
                bootstrap_iters=0,
            )
            if found is None:  # it gives results on the first rank
                continue
            for name in (getattr(item, "task_name", None) or item.name for item in items):
                values = {key.partition(",")[0]: value for key, value in found["results"][name].items() if isinstance(value, (int, float))}
                rows[name] = {**values, "shots": found["n-shot"].get(name, shots), "version": found["versions"].get(name)}
    return Answers(rows, settings)


def _shared(model: Any, ranks: Ranks) -> Any:
    """lm-eval's model class as one of so many processes that have the model each: it knows of accelerate's alone, which load it."""
    if ranks.world == 1:
        return model

    class Shared(model):
        def __init__(self, **options: Any):
            super().__init__(**options)
            self._rank, self._world_size = ranks.rank, ranks.world

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            found = [torch.empty_like(tensor.cpu()) for _ in range(ranks.world)]
            dist.all_gather(found, tensor.cpu())
            return torch.stack(found).flatten()

        def barrier(self) -> None:
            ranks.wait()

    return Shared


def _settings(harness_model: Any, config: HarnessConfig, directory: Path) -> dict[str, Any]:
    """What scores move with, as it really is: whether prompts begin with BOS is read off an encoded one."""
    bos, plain = harness_model.tokenizer.bos_token_id, harness_model.tokenizer.encode("a", add_special_tokens=False)
    begins = bos is not None and harness_model.tok_encode("a")[: len(plain) + 1] == [bos, *plain]
    if config.add_bos_token and not begins:
        raise UserError(
            f"harness.add_bos_token=true, but the tokenizer of {directory} begins no text with a BOS token",
            "a tokenizer that adds one (`add_bos_token` in its tokenizer_config.json, or a post-processor)",
            "leave add_bos_token out",
        )
    return {"add_bos_token": begins, "max_length": harness_model.max_length}
