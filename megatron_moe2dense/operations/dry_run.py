"""`moe2dense distill --dry-run`: whether a run could start, what it would read and write, how much it trains and what it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_moe2dense.common.config import build
from megatron_moe2dense.operations.plan import memory
from megatron_moe2dense.operations.plan.config import NODE, PlanConfig
from megatron_moe2dense.operations.plan.hardware import Machine
from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.operations.plan.run import job_of, of_run
from megatron_moe2dense.operations.plan.search import judge
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import parts, startup
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig, TeacherConfig
from megatron_moe2dense.trainer.flops import forward_flops
from megatron_moe2dense.trainer.layout import answers, refuse
from megatron_moe2dense.trainer.outline import count_parameters


def distill(config: DistillConfig) -> dict[str, Any]:
    """`facts`, when nothing would stop the run on the machines that it is for; UserError of all that would."""
    processes = startup.processes(config.parallel)
    refuse(answers(startup.of_run(config, processes, startup.Opened(config.dtype))))
    return {**facts(config), "on_h100": _on_paper(config, processes)}


def _on_paper(config: DistillConfig, processes: int) -> dict[str, Any] | None:
    """`plan`'s steps, hours, GPU-hours and USD of this run in this layout on as many H100; None for float32, for which it has no rates,
    and where they make no whole nodes."""
    if config.dtype == "float32" or (processes > NODE and processes % NODE):
        return None
    run = config.model_dump(mode="json", by_alias=True)
    planned = build(PlanConfig, {**run, "hardware": {"gpus": processes}}, "plan")
    return of_run(planned, judge(job_of(planned), Machine(planned.hardware)))


def facts(config: DistillConfig, processes: int | None = None) -> dict[str, Any]:
    """Steps, tokens, parameters, model FLOPs (see `flops`) and bytes, from config.json files alone.

    memory_bytes: of all processes together, without activations and padding: weights, float32 gradients, the optimizer's moments and, in
    bfloat16, master weights of the student (of frozen parts the weights alone); weights of the teacher. memory_per_process: by pipeline
    stage and part (`plan.memory`), on this many processes, by default those that this runs on, or the fewest that the layout needs.
    """
    half = config.dtype == "bfloat16"
    tokens = config.steps() * config.batch.global_ * config.data.sequence_length
    per_pass = {"student": (3, 2 + 4 + 4 + 8 if half else 4 + 4 + 8), "teacher": (1, 2 if half else 4)}
    found: dict[str, Any] = {"steps": config.steps(), "tokens": tokens, "flops": 0, "memory_bytes": {}}
    specs: dict[str, models.ModelSpec] = {}
    for name, directory in (("student", config.student), ("teacher", config.live_teacher)):
        if directory is None:
            continue
        spec = specs[name] = models.ModelSpec.read(directory, getattr(torch, config.dtype))
        if name == "teacher" and config.teacher is not None:
            spec = specs[name] = replace(spec, in_fp8=config.teacher.dtype == "fp8")
        total, active = spec.stock.parameters, spec.stock.active_parameters(spec.dims.active)
        passes, nbytes = per_pass[name]
        found[name] = {"directory": directory, "family": spec.family.name, "parameters": total, "active_parameters": active}
        experts = config.active_experts() if name == "teacher" else None
        found["flops"] += int(passes * forward_flops(spec, config.data.sequence_length, experts) * tokens)
        found["memory_bytes"][name] = nbytes * total
        if name == "student":
            frozen, matrices = parts.frozen(config.train.parts, spec)
            found["memory_bytes"][name] -= (nbytes - (2 if half else 4)) * frozen
            if config.optim.muon is not None:  # one moment in place of two, of the layers' matrices
                dims = spec.dims
                tables = dims.vocab_size * dims.hidden_size * (1 if dims.tied_embeddings else 2)
                found["memory_bytes"][name] -= 4 * (count_parameters(spec)[0] - tables - matrices)
        elif spec.in_fp8:
            whole = replace(_job(config, specs, 1), parallel=ParallelConfig())
            found["memory_bytes"][name] = memory.teacher_bytes(whole, 0)
    found["checkpoint_bytes"] = memory.checkpoint_bytes(found["student"]["parameters"], 2 if half else 4)
    found["memory_per_process"] = _memory_per_process(config, specs, processes)
    files = [source.path for source in config.data.sources()]
    found["reads"] = [path for path in (*files, config.data.validation, config.student, *_of_teacher(config.teacher)) if path]
    found["writes"] = [f"{config.output}/checkpoints", f"{config.output}/metrics.jsonl"]
    return found


def _of_teacher(config: TeacherConfig | None) -> tuple[str | None, ...]:
    return () if config is None else (config.path, config.cache)


def _memory_per_process(config: DistillConfig, specs: dict[str, models.ModelSpec], processes: int | None) -> dict[str, dict[str, int]]:
    job = _job(config, specs, processes or startup.processes(config.parallel))
    return {f"stage {stage}": memory.of_stage(job, stage).parts() for stage in job.stages()}


def _job(config: DistillConfig, specs: dict[str, models.ModelSpec], processes: int) -> Job:
    return Job(
        student=specs["student"],
        teacher=specs.get("teacher"),
        active=config.active_experts(),
        parallel=config.parallel,
        batch=config.batch,
        length=config.data.sequence_length,
        world=processes,
        loss=config.resolved_loss(),
        kernels=config.device != "cpu",
        fp8=config.fp8 is not None,
        muon=config.optim.muon is not None,
        parts=config.train.parts,
    )
