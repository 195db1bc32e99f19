"""`moe2dense cache-teacher`: the teacher alone over the samples of a training stream, its top-k log-probabilities to disk.

Shards go to the data-parallel ranks in turns. Any layout may go on where another was killed: a shard is complete or absent.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import (
    MANIFEST,
    claim,
    disk_errors,
    publish,
    read_json,
    require_apart,
    require_of_stage,
    write_manifest,
)
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime, startup, teacher
from megatron_moe2dense.trainer.agreement import raise_on_all_ranks
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.cache.files import STAGE, CacheFacts, shard_path, tokenizer_hash
from megatron_moe2dense.trainer.cache.fill import Filler
from megatron_moe2dense.trainer.config import BatchConfig, DistillConfig, TrainConfig
from megatron_moe2dense.trainer.data.config import TrainDataConfig
from megatron_moe2dense.trainer.data.datasets import Reading, identity, require_samples, training_dataset
from megatron_moe2dense.trainer.data.samples import Samples
from megatron_moe2dense.trainer.flops import forward_flops
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.layout import Layout, Question, answers, refuse
from megatron_moe2dense.trainer.runtime import Runtime
from megatron_moe2dense.trainer.verification.verify import verify_teacher

# Where and how it is computed; the content of the cache is the same, or nearly so.
_MAY_CHANGE = ("parallel", "micro_batch", "device", "overwrite", "output")
# What `CacheFacts` knows by fingerprint: not how a path is spelled.
_BY_CONTENT = ("teacher", "data")


def run(config: CacheTeacherConfig) -> None:
    """Write the cache; started again after a kill, only the shards that are not there yet.

    Raises:
        UserError: output in the way, text or teacher changed since a first part was written, too few samples, k above the vocabulary.
    """
    with runtime.session(config.device) as device:
        opened = startup.Opened(config.dtype)
        startup.require(questions(config, dist.get_world_size(), opened))
        with process_groups.initialized(config.parallel, config.seed) as groups:
            _write(config, groups, device, opened.specs["teacher"])


def _write(config: CacheTeacherConfig, groups: Groups, device: Runtime, spec: models.ModelSpec) -> None:
    working, facts = _claimed(config, spec)
    with _nothing_left_of_a_refusal(working):
        reading = Reading(config.data, config.seed, facts.vocab_size, working / "data_index")
        samples = Samples(training_dataset(reading, facts.samples), reading)
        live = teacher.build(spec, _as_a_run(config), groups, device)
        verify_teacher(live, _as_a_run(config), groups, samples.batch([0], device.device), recorded=None)
    filler = Filler(facts, working, groups, live, samples, config.micro_batch, device.device)
    filler.fill(_missing(working, facts))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(samples.reading.index)
        _write_manifest(working, "finished", config, facts)
        publish(working, Path(config.output))
        nbytes = facts.samples * config.data.sequence_length * config.bytes_per_token()
        print(f"{config.output}: {facts.samples} samples, {nbytes} bytes")
    dist.barrier()


def questions(config: CacheTeacherConfig, world: int, opened: startup.Opened) -> Iterator[Question]:
    """What has to hold before anything is built or written, on so many processes; see `startup`."""
    yield Question("teacher", lambda: opened.open_teacher(config.model, config.teacher.dtype))
    spec = opened.specs.get("teacher")
    yield from Layout(
        student=None,
        teacher=spec,
        active=config.teacher.active,
        parallel=config.parallel,
        batch=None,
        length=config.data.sequence_length,
        world=world,
    ).questions()
    if spec is None:
        return
    vocab_size = spec.dims.vocab_size
    yield Question("k", lambda: _require_k(config, vocab_size))
    reading = Reading(config.data, config.seed, vocab_size, Path(config.output + ".tmp") / "data_index")
    yield Question("text", lambda: require_samples(reading, _samples(config)))


def _require_k(config: CacheTeacherConfig, vocab_size: int) -> str:
    if config.k > vocab_size:
        raise UserError(f"k={config.k}", f"at most the vocabulary of {vocab_size}", "choose a smaller k")
    return str(config.k)


def dry_run(config: CacheTeacherConfig) -> dict[str, Any]:
    """`facts`, when nothing would stop the command; UserError of all that would."""
    refuse(answers(questions(config, startup.processes(config.parallel), startup.Opened(config.dtype))))
    return facts(config)


def facts(config: CacheTeacherConfig) -> dict[str, Any]:
    """Samples, tokens, FLOPs (`flops.forward_flops`), bytes of the cache, and of full bfloat16 logits beside it, from config.json alone."""
    spec = models.ModelSpec.read(config.model, getattr(torch, config.dtype))
    tokens = _samples(config) * config.data.sequence_length
    per_token = forward_flops(spec, config.data.sequence_length, config.teacher.active)
    return {
        "samples": _samples(config),
        "tokens": tokens,
        "flops": int(per_token * tokens),
        "bytes": tokens * config.bytes_per_token(),
        "bytes_per_token": config.bytes_per_token(),
        "bytes_per_token_of_full_logits": 2 * spec.dims.vocab_size,
        "reads": [config.model, *(source.path for source in config.data.sources())],
        "writes": config.output,
    }


def _samples(config: CacheTeacherConfig) -> int:
    if config.samples is not None:
        return config.samples
    assert config.data.path is not None, "a blend needs `samples`"
    return (len(TokenFile.open(config.data.path).tokens) - 1) // config.data.sequence_length * config.data.epochs


def _facts(config: CacheTeacherConfig, spec: models.ModelSpec) -> CacheFacts:
    dims = spec.dims
    active = config.teacher.active
    return CacheFacts(
        teacher=spec.opened.index.fingerprint(),
        tokenizer=tokenizer_hash(hub.located(config.model)),
        vocab_size=dims.vocab_size,
        active=active if active is not None else dims.active or None,
        data=identity(config.data, config.seed),
        samples=_samples(config),
        k=config.k,
        store=config.store,
        shard_samples=config.shard_samples,
        teacher_dtype=config.teacher.dtype,
    )


def _claimed(config: CacheTeacherConfig, spec: models.ModelSpec) -> tuple[Path, CacheFacts]:
    """Rank 0 takes the working directory; its facts, or its error, reach every rank."""
    working = Path(config.output + ".tmp")
    with raise_on_all_ranks():
        found = [_claim(config, working, spec) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return working, found[0]


def _claim(config: CacheTeacherConfig, working: Path, spec: models.ModelSpec) -> CacheFacts:
    facts = _facts(config, spec)
    require_apart(config.model_dump(mode="json"))
    require_of_stage(Path(config.output), STAGE)
    if claim(Path(config.output), working, _identity(config), config.overwrite):
        before = CacheFacts.of_manifest(read_json(working / MANIFEST, "the manifest of an unfinished run"), working)
        if before != facts:
            raise UserError(
                f"{working} was begun with other text or another teacher: {_differences(before, facts)}",
                "the files it was begun with",
                "bring them back, or remove it and start again",
            )
    with disk_errors(working):
        working.mkdir(parents=True, exist_ok=True)
    _write_manifest(working, "unfinished", config, facts)
    return facts


@contextlib.contextmanager
def _nothing_left_of_a_refusal(working: Path) -> Iterator[None]:
    """What is refused before its first shard does not stand in the way of the config that mends it."""
    try:
        yield
    except UserError:
        if dist.get_rank() == 0 and not list(working.glob("shard_*")):
            shutil.rmtree(working)
        raise


def _missing(working: Path, facts: CacheFacts) -> list[int]:
    """Shards to write, the same list on every rank."""
    found = [[number for number in range(facts.shards) if not shard_path(working, number).exists()]]
    dist.broadcast_object_list(found)
    if len(found[0]) < facts.shards:
        logger.info("%d of %d shards are there", facts.shards - len(found[0]), facts.shards)
    return found[0]


def _differences(before: CacheFacts, now: CacheFacts) -> str:
    return ", ".join(name for name in vars(now) if getattr(before, name) != getattr(now, name))


def _identity(config: CacheTeacherConfig) -> dict[str, Any]:
    content = {name: value for name, value in config.model_dump(mode="json").items() if name not in (*_MAY_CHANGE, *_BY_CONTENT)}
    routing = config.teacher.routing
    content["teacher_routing"] = routing and routing.model_dump()  # as in caches that were begun when it stood beside the teacher
    return content if config.teacher.dtype == "model" else {**content, "teacher_dtype": config.teacher.dtype}


def _write_manifest(working: Path, status: Any, config: CacheTeacherConfig, facts: CacheFacts) -> None:
    stated = {"identity": _identity(config), **facts.as_manifest()}
    write_manifest(working, status, STAGE, config.model_dump(mode="json", by_alias=True), **stated)


def _as_a_run(config: CacheTeacherConfig) -> DistillConfig:
    """The run whose teacher this is, as far as building the teacher goes."""
    return DistillConfig(
        student=config.model,
        teacher=config.teacher,
        output=config.output,
        data=TrainDataConfig(**config.data.model_dump()),
        parallel=config.parallel,
        batch=BatchConfig(micro=config.micro_batch),
        train=TrainConfig(steps=1, seed=config.seed),
        device=config.device,
        dtype=config.dtype,
    )
