"""Which run an output belongs to, by content where a hash stands and never by how a path is spelled: files may move, and their copies are
they. Says what an output is to a config (new, resumed, extended), and writes its manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import (
    MANIFEST,
    Status,
    differences,
    read_json,
    read_own_manifest,
    require_apart,
    require_of_stage,
    write_manifest,
)
from megatron_moe2dense.trainer.cache.files import CacheReader
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.datasets import texts

STAGE = "distill"
# What may change between the parts of one run: layout and logging, not the mathematics; train.steps may grow.
_MAY_CHANGE = ("parallel", "logging", "device", "overwrite", "output")
_MAY_CHANGE_IN_TRAIN = ("save_every", "keep", "async_save", "eval_every", "log_every", "timeout", "most_skipped", "spike", "tokens")
_NOT_OF_DATA = ("path", "blend", "validation", "validation_sequences")  # paths, and how much is evaluated on
# What a manifest keeps through all parts of a run. The inputs are read once, when it begins: they may be gone when it ends.
_KEPT = ("plan_hash", "revisions", "teacher", "data", "identity", "run_id", "lengths")

Claim = Literal["new", "resumed", "extended"]


def identity(config: DistillConfig, text: dict[str, Any] | None = None) -> dict[str, Any]:
    """What decides the numbers of a run, models and text by their fingerprints; UserError where they can not be read.

    Args:
        text: `texts` of this config, where they are known.
    """
    content = {name: value for name, value in _dump(config).items() if name not in _MAY_CHANGE}
    if config.fp8 is None:  # runs begun before there was this key are the same runs
        del content["fp8"]
    if config.optim.muon is None:
        del content["optim"]["muon"]
    if config.moe is None:  # otherwise each micro-batch balances its own tokens
        del content["batch"]["micro"]
    text = text or texts(config.data, config.train.seed)
    content["student"] = _student(config)
    block, live = content.pop("teacher") or {}, config.live_teacher
    content["teacher_routing"] = block.get("routing")  # beside the teacher, as in runs that were begun when it stood there
    if block.get("dtype", "model") != "model":
        content["teacher_dtype"] = block["dtype"]
    content["teacher"] = CheckpointIndex.open(live).fingerprint() if live is not None else None
    content["teacher_cache"] = _cache(config.teacher_cache)
    content["data"] = {name: value for name, value in content["data"].items() if name not in _NOT_OF_DATA}
    content["data"] |= {"sources": text["training"]["sources"], "validation": text["validation"]}
    content["train"] = {name: value for name, value in content["train"].items() if name not in _MAY_CHANGE_IN_TRAIN}
    content["train"]["steps"] = config.steps()
    if config.train.parts == "all":  # as in runs begun before parts could be chosen
        del content["train"]["parts"]
    elif isinstance(config.train.parts, list):
        content["train"]["parts"] = sorted(config.train.parts)
    return content


def _student(config: DistillConfig) -> str:
    if config.initialize != "random":
        return CheckpointIndex.open(config.student).fingerprint()
    content = read_json(hub.located(config.student) / "config.json", "the student's Hugging Face directory with its config.json")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cache(directory: str | None) -> dict[str, Any] | None:
    """What the cache is of; a longer one begins with the same samples."""
    if directory is None:
        return None
    facts = asdict(CacheReader(Path(directory)).facts)
    plain = ["teacher_dtype"] if facts["teacher_dtype"] == "model" else []  # as in runs begun before there was another
    return {name: value for name, value in facts.items() if name not in ("samples", "shard_samples", "format", *plain)}


def claimable(config: DistillConfig) -> Claim:
    """What the output is to this config; nothing is changed.

    Raises:
        UserError: it is a finished run that is not made longer, one of another config (named are the keys that differ), or no run.
    """
    output = Path(config.output)
    require_apart(_dump(config))
    if not (output / MANIFEST).exists():
        if output.exists() and not config.overwrite:
            raise UserError(f"{output} exists", "a path that does not exist yet", "choose another output or add overwrite=true")
        return "new"
    found = read_own_manifest(output / MANIFEST, f"the manifest of a run of `{STAGE}`")
    require_of_stage(output, STAGE)
    begun, own = _begun(found, output), identity(config)
    changed = differences({**begun, "train": {**begun["train"], "steps": 0}}, {**own, "train": {**own["train"], "steps": 0}})
    before, now = begun["train"]["steps"], own["train"]["steps"]
    finished = found["status"] == "finished"
    if config.overwrite and (finished or changed or now < before):
        return "new"
    if finished and not changed and now <= before:
        do = f"choose another output, add overwrite=true, or go on with it: train.steps above {before}"
        raise UserError(f"{output} is a finished output: {before} steps", "a path that does not exist yet, or more steps", do)
    if now < before:
        changed.append(f"train.steps: {before} -> {now}")
    if changed:
        raise UserError(
            f"{output} is {'a finished' if finished else 'an unfinished'} run of another config ({'; '.join(changed)})",
            "the config that it was begun with, but for `train.steps`, which may grow, and what no number depends on",
            "give these keys their old values, or choose another output; overwrite=true would delete the run that is there",
        )
    return "resumed" if now == before else "extended"


def _begun(found: dict[str, Any], output: Path) -> dict[str, Any]:
    """The identity in a manifest; of a run begun before manifests had one, that of its config and of the text it recorded."""
    if "identity" in found:
        return found["identity"]
    content = identity(build(DistillConfig, found["config"], f"{output / MANIFEST}, of an earlier version"))
    text = found.get("data")
    if text is not None:
        content["data"] |= {"sources": text["training"]["sources"], "validation": text["validation"]}
    return content


def claim(config: DistillConfig) -> Claim:
    """Take the output: what is in the way of a new run goes. Errors as of `claimable`."""
    output, found, text = Path(config.output), claimable(config), texts(config.data, config.train.seed)
    if found == "new":
        if output.exists():
            shutil.rmtree(output)
        made_by = hub.located(config.student) / MANIFEST
        plan_hash = read_json(made_by, "the student's manifest").get("plan_hash") if made_by.exists() else None
        first = {"plan_hash": plan_hash, "revisions": _revisions(config), "teacher": None, "data": text}
        first |= {"run_id": uuid.uuid4().hex[:16], "lengths": [config.steps()]}
    else:
        before = recorded(config)
        lengths = before.get("lengths") or [_begun(before, output)["train"]["steps"]]
        first = {"lengths": lengths if found == "resumed" else [*lengths, config.steps()]}
        if "run_id" not in before:
            first["run_id"] = before["config_hash"]
    write(config, "unfinished", identity=identity(config, text), **first)
    return found


def _revisions(config: DistillConfig) -> dict[str, dict[str, str]]:
    """Name and commit of the models that were read from the Hugging Face cache."""
    models = {"student": config.student, "teacher": config.teacher.path if config.teacher is not None else None}
    found = {name: hub.revision_of(hub.located(path)) for name, path in models.items() if path}
    return {name: each["revision"] for name, each in found.items() if each}


def recorded(config: DistillConfig) -> dict[str, Any]:
    """The manifest of the run, empty when there is none."""
    manifest = Path(config.output) / MANIFEST
    return read_json(manifest, "the manifest of this run") if manifest.exists() else {}


def write(config: DistillConfig, status: Status, **facts: Any) -> None:
    """The run's manifest: `facts`, and of the earlier one what stays through all parts of a run."""
    kept = {name: value for name, value in recorded(config).items() if name in _KEPT}
    write_manifest(Path(config.output), status, STAGE, _dump(config), **{**kept, **facts})


def _dump(config: DistillConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)
