"""`moe2dense eval`: measures each model, appends one row a model to records.jsonl and prints the table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import records
from megatron_moe2dense.common.content import identity
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import MANIFEST, differences, read_json, versions
from megatron_moe2dense.common.table import render
from megatron_moe2dense.compute.device import chosen_dtype, open_device
from megatron_moe2dense.compute.ranks import Ranks, joined
from megatron_moe2dense.evals.config import EvalConfig
from megatron_moe2dense.evals.endpoint import Endpoint
from megatron_moe2dense.evals.generation import speeds
from megatron_moe2dense.evals.harness import Answers, Tasks, answer, in_process, load_tasks, require_tokenizer
from megatron_moe2dense.evals.models import (
    free_bytes,
    load_model,
    max_positions,
    require_accelerate,
    vocab_size,
)
from megatron_moe2dense.evals.perplexity import Loaded, Measured, measure
from megatron_moe2dense.evals.windows import Windows, cut_all
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.probe import probe

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Context:
    """What all models of a run share: its processes, the teacher, the loaded lm-eval tasks, token windows (int64 [N, S])."""

    ranks: Ranks
    teacher: Loaded | None
    tasks: Tasks | None
    windows: Windows


def run(config: EvalConfig) -> None:
    """Evaluate every model that has no row yet, in the order given. Under torchrun each process has the models whole, and a share of the
    windows and of the questions; the first writes.

    Raises:
        UserError: an output in the way, a broken or unsuitable model, tokens of another tokenizer, an unknown task, and all of `Endpoint`.
    """
    with joined() as ranks:
        measure_all(config, ranks) if config.endpoint is None else measure_served(config, ranks)


def measure_all(config: EvalConfig, ranks: Ranks) -> None:
    """What `run` does, as one process of these."""
    device = open_device(config.device, ranks)
    dtype = chosen_dtype(config.dtype, config.device)
    if config.device_map:
        _require_one_process(ranks, "device_map", "start eval without torchrun, or leave device_map out")
        require_accelerate()
    accounts, of_teacher = _opened(config)
    indices, teacher_index = {label: account.index for label, account in accounts.items()}, of_teacher.index if of_teacher else None
    windows = cut_all(config, indices)
    done = _done(config, indices)
    tasks = _tasks(config, indices, ranks)
    todo = {label: account for label, account in accounts.items() if label not in done}
    beside = 1 if device.type == "cuda" else ranks.on_node()  # processes that share the device's memory
    _require_room(todo, of_teacher, device, beside * _BYTES[dtype] if config.device_map is None else 0)
    ranks.wait()  # until all have read what is there
    if ranks.rank == 0 and not config.overwrite and Path(config.output).exists():
        records.rewrite(Path(config.output), records.read(Path(config.output)))  # a line cut off by a kill must not swallow the next row
    teacher = Loaded("teacher", load_model(teacher_index, device, dtype, config.device_map)) if teacher_index else None
    for label, index in indices.items():
        if label in done:
            logger.info("%s: already in %s", label, config.output)
            continue
        # The teacher among the models is not loaded twice.
        known = teacher_index is not None and _is_same(teacher_index, index)
        model = teacher.model if known and teacher is not None else load_model(index, device, dtype, config.device_map)
        row = _record(config, Loaded(label, model), index, Context(ranks, teacher, tasks, windows))
        if ranks.rank == 0 and config.overwrite and label == next(iter(todo)):
            records.rewrite(Path(config.output), [row])  # what was there stays until there is something in its place
        elif ranks.rank == 0:
            records.append(Path(config.output), row)
        del model
    if ranks.rank == 0:
        print(_table(records.read(Path(config.output))))


def measure_served(config: EvalConfig, ranks: Ranks) -> None:
    """The one model as the endpoint serves it: no weights are loaded here."""
    _require_one_process(ranks, "endpoint", "raise endpoint.concurrency instead of starting processes")
    start = time.perf_counter()
    endpoint, label, account, context = _at_endpoint(config, ranks)
    metrics, tokens = _quality(config, endpoint, context)
    settings: dict[str, Any] = {"endpoint": endpoint.settings, "processes": 1}
    if config.harness and context.tasks:
        found = endpoint.answers(config.harness, context.tasks)
        metrics |= _accuracies(config, found)
        settings["harness"] = found.settings
    head = {"model": label, **_origin(account.index), "parameters": account.stock.parameters}
    records.rewrite(Path(config.output), [{**head, **_measured(config, settings, metrics, tokens, start)}])
    print(_table(records.read(Path(config.output))))


def _at_endpoint(config: EvalConfig, ranks: Ranks) -> tuple[Endpoint, str, Account, Context]:
    """The engine, and the label and folder of what it serves; UserError for what it can't be asked, before anything is."""
    assert config.endpoint is not None
    accounts, _ = _opened(config)
    [(label, account)] = accounts.items()
    index = account.index
    windows = cut_all(config, {label: index})
    _done(config, {label: index})
    require_tokenizer(index.directory)
    tasks = _tasks(config, {label: index}, ranks)
    scored = "perplexity" if config.perplexity else f"the task {tasks.scored[0]}" if tasks and tasks.scored else None
    endpoint = Endpoint.open(config.endpoint, index, max_positions(index), scored)
    if windows.nll_NS is not None:
        endpoint.require_length(windows.nll_NS.shape[1])
    return endpoint, label, account, Context(ranks, None, tasks, windows)


def _tasks(config: EvalConfig, indices: Mapping[str, CheckpointIndex], ranks: Ranks) -> Tasks | None:
    if config.harness is None:
        return None
    for index in indices.values():
        require_tokenizer(index.directory)
    return load_tasks(config.harness, ranks)


def _require_one_process(ranks: Ranks, name: str, do: str) -> None:
    if ranks.world > 1:
        raise UserError(f"{name} in {ranks.world} processes, each of which would do all of it", "one process", do)


def _is_same(one: CheckpointIndex, other: CheckpointIndex) -> bool:
    return one.directory.resolve() == other.directory.resolve()


def _require_room(accounts: Mapping[str, Account], teacher: Account | None, device: torch.device, width: int) -> None:
    """UserError before anything is loaded when the weights of the largest model and the teacher, of so many bytes a number, have no room on
    the device."""
    beside = teacher.values.total * width if teacher is not None else 0
    free = free_bytes(device)
    for label, account in accounts.items():
        known = teacher is not None and _is_same(teacher.index, account.index)
        needed = (0 if known else account.values.total * width) + beside
        if free is not None and needed > free:
            raise UserError(
                f"{label}: {needed / 1e9:.1f} GB of weights{' with the teacher' if beside else ''}, {free / 1e9:.1f} GB free on {device}",
                "room for them",
                "set dtype=bfloat16, device_map=auto to spread them over GPUs, or another device",
            )


def dry_run(config: EvalConfig) -> dict[str, Any]:
    """What would be read and written: bytes, tokens, forward FLOPs and peak memory (models in `dtype` and their logits), and the questions
    of each task, whose data is looked up. Of an endpoint what it serves, and what it would be asked."""
    if config.endpoint is not None:
        endpoint, label, _, context = _at_endpoint(config, Ranks())
        return {
            "endpoint": endpoint.settings,
            "writes": config.output,
            "models_to_measure": [label],
            "tokens_per_model": 0 if context.windows.nll_NS is None else int(context.windows.nll_NS.size),
            "questions": context.tasks.questions if context.tasks else {},
        }
    accounts, teacher = _opened(config)
    indices = {label: account.index for label, account in accounts.items()}
    width = _BYTES[chosen_dtype(config.dtype, config.device)]
    done = _done(config, indices)
    todo = [account for label, account in accounts.items() if label not in done]
    windows = cut_all(config, indices)
    nll_tokens, kl_tokens = (0 if block is None else int(block.size) for block in (windows.nll_NS, windows.kl_NS))
    flops = sum(2 * _active_parameters(account) * (nll_tokens + kl_tokens) for account in todo)
    memory = max((account.values.total for account in todo), default=0) * width
    if teacher and config.perplexity:
        flops += 2 * _active_parameters(teacher) * (kl_tokens or nll_tokens) * len(todo)
        memory += teacher.values.total * width
    if config.perplexity:
        rows = max(config.perplexity.batch_tokens, config.perplexity.data.sequence_length)
        memory += (1 + bool(teacher)) * rows * max(vocab_size(index) for index in indices.values()) * width
    tasks = _tasks(config, indices, Ranks())
    read = {str(index.directory): index.nbytes for index in ([*indices.values(), teacher.index] if teacher else indices.values())}
    return {
        "reads_bytes": read,
        "writes": config.output,
        "models_to_measure": [label for label in indices if label not in done],
        "tokens_per_model": nll_tokens + kl_tokens,
        "questions": tasks.questions if tasks else {},
        "forward_flops": flops,
        "memory_bytes": memory,
    }


def _opened(config: EvalConfig) -> tuple[dict[str, Account], Account | None]:
    """The models by label and the teacher; UserError for one that is not whole, and for a teacher of another vocabulary."""
    accounts = {label: Account.open(directory) for label, directory in config.directories().items()}
    teacher = Account.open(config.kl.teacher) if config.kl else None
    for label, account in accounts.items():
        if teacher is not None and vocab_size(account.index) != vocab_size(teacher.index):
            raise UserError(
                f"{label} has a vocabulary of {vocab_size(account.index)}, the teacher {vocab_size(teacher.index)}",
                "teacher and model with the same vocabulary",
                "compare models that share a tokenizer",
            )
    return accounts, teacher


def _done(config: EvalConfig, indices: dict[str, CheckpointIndex]) -> set[str]:
    """Labels an unfinished run of this config has measured already."""
    path = Path(config.output)
    if config.overwrite or not path.exists():
        return set()
    rows, own = records.read(path), _identity(config)
    for row in rows:
        label = row.get("model")
        changed = differences(row.get("identity") or _identity(EvalConfig(**row["config"])), own) if "config" in row else ["config"]
        if changed or label not in indices:
            raise UserError(
                f"{path} holds rows of another evaluation (model {label!r}; {'; '.join(changed)})",
                "a path that does not exist yet, or an unfinished run of this config",
                "choose another output or add overwrite=true",
            )
        if row.get("fingerprint") != indices[label].fingerprint():
            raise UserError(f"{path}: {label} has changed since it was measured", "the same weights", "add overwrite=true to measure again")
    done = {row["model"] for row in rows}
    if done == set(indices):
        raise UserError(f"{path} is a finished output", "a path that does not exist yet", "choose another output or add overwrite=true")
    return done


def _identity(config: EvalConfig) -> dict[str, Any]:
    """What decides the numbers of all models; which model a row is of, its fingerprint says."""
    return {**identity(config.model_dump(mode="json")), "models": list(config.directories())}


def _record(config: EvalConfig, subject: Loaded, index: CheckpointIndex, context: Context) -> dict[str, Any]:
    start = time.perf_counter()
    metrics, tokens = _quality(config, subject, context)
    settings = {**_settings(subject), "processes": context.ranks.world}
    if config.harness and context.tasks:
        asked = in_process(subject.model, index.directory, config.harness, context.ranks)
        found = answer(asked, "lm-eval hf, causal", index.directory, config.harness, context.tasks)
        metrics |= _accuracies(config, found)
        settings["harness"] = found.settings
    if config.generation and context.windows.prompts_NS is not None and context.ranks.rank == 0:
        metrics["generation"] = speeds(subject, context.windows.prompts_NS, config.generation)
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    head = {"model": subject.name, **_origin(index), "parameters": parameters}
    return {**head, **_measured(config, settings, metrics, tokens, start)}


def _origin(index: CheckpointIndex) -> dict[str, Any]:
    return {"plan_hash": _plan_hash(index.directory), "fingerprint": index.fingerprint()}


def _measured(config: EvalConfig, settings: dict[str, Any], metrics: dict[str, Any], tokens: int, start: float) -> dict[str, Any]:
    """What a row says beside whose it is. start: of the measurement, by time.perf_counter."""
    return {
        "config": config.model_dump(mode="json"),
        "identity": _identity(config),
        "settings": settings,
        "metrics": metrics,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 3),
        "versions": versions(),
    }


def _accuracies(config: EvalConfig, found: Answers) -> dict[str, Any]:
    assert config.harness is not None
    accuracy = found.accuracy(config.harness)
    metrics: dict[str, Any] = {"harness": found.by_task, "accuracy": accuracy}
    metrics["accuracy_metric"] = {task: config.harness.metric(task) for task in accuracy}
    if len(accuracy) > 1:
        metrics["mean_accuracy"] = sum(accuracy.values()) / len(accuracy)
    return metrics


def _settings(subject: Loaded) -> dict[str, Any]:
    """What numbers move with beside the config's own keys, as it turned out here."""
    model = subject.model
    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "class": type(model).__name__,
        "attention": model.config._attn_implementation,
        "experts": model.config._experts_implementation,
    }


def _quality(config: EvalConfig, subject: Loaded | Endpoint, context: Context) -> tuple[dict[str, Any], int]:
    """The metrics on token windows and the positions predicted for them; a second pass where the KL has its own data."""
    teacher, nll_NS, kl_NS = context.teacher, context.windows.nll_NS, context.windows.kl_NS
    if nll_NS is None or config.perplexity is None:
        return {}, 0

    def measured(windows_NS: np.ndarray, teacher: Loaded | None, stride: int | None) -> Measured:
        batch = _batch_windows(config, windows_NS)
        if isinstance(subject, Endpoint):
            return subject.nll(windows_NS, batch, stride)
        own = measure(subject, context.ranks.share(windows_NS, batch), batch, teacher, stride)
        return own.over(context.ranks)

    first = measured(nll_NS, None if kl_NS is not None else teacher, config.perplexity.stride)
    metrics: dict[str, Any] = {"nll": first.nll, "perplexity": first.perplexity}
    if teacher is None:
        return metrics, first.positions
    second = first if kl_NS is None else measured(kl_NS, teacher, None)
    metrics |= {"kl": second.kl, "top1_agreement": second.top1_agreement}
    return metrics, first.positions + (0 if kl_NS is None else second.positions)


def _batch_windows(config: EvalConfig, windows_NS: np.ndarray) -> int:
    assert config.perplexity is not None
    return max(1, config.perplexity.batch_tokens // windows_NS.shape[1])


def _active_parameters(account: Account) -> int:
    """Parameters a token goes through: of E routed experts only the A selected ones."""
    stock = account.stock
    return stock.active_parameters(probe(stock, stock.moe[max(stock.moe)]).active if stock.moe else 0)


def _plan_hash(directory: Path) -> str | None:
    """The conversion plan the model came from, as its manifest says; None for a model that was not converted."""
    if not (directory / MANIFEST).exists():
        return None
    return read_json(directory / MANIFEST, "a manifest").get("plan_hash")


def _table(rows: list[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(task for row in rows for task in row["metrics"].get("accuracy", {})))
    speeds_at = list(dict.fromkeys(item["batch"] for row in rows for item in row["metrics"].get("generation", [])))
    header = ["model", "parameters", "nll [nats]", "perplexity", "KL(teacher||model) [nats]", "top-1 agreement", *tasks, "mean of tasks"]
    header += [f"{phase}, batch {batch} [tokens/s]" for batch in speeds_at for phase in ("prefill", "decode")]
    body = []
    for row in rows:
        values = row["metrics"]
        found = [values.get(name) for name in ("nll", "perplexity", "kl", "top1_agreement")]
        found += [*(values.get("accuracy", {}).get(task) for task in tasks), values.get("mean_accuracy")]
        for item in values.get("generation", []):
            found += [item["prefill_tokens_per_second"], item["decode_tokens_per_second"]]
        body.append([row["model"], row["parameters"], *found])
    used = [i for i in range(len(header)) if i < 2 or any(line[i] is not None for line in body)]
    return render([header[i] for i in used], [[line[i] for i in used] for line in body])
