"""`moe2dense plan`: judge a layout, or suggest the best ones, from config.json files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import read_json, write_json
from megatron_moe2dense.common.progress import duration
from megatron_moe2dense.common.table import render
from megatron_moe2dense.operations.plan import communication, timing
from megatron_moe2dense.operations.plan.config import PlanConfig
from megatron_moe2dense.operations.plan.hardware import Machine
from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.operations.plan.memory import checkpoint_bytes
from megatron_moe2dense.operations.plan.search import Verdict, judge, search
from megatron_moe2dense.trainer import parts
from megatron_moe2dense.trainer.config import BatchConfig, ParallelConfig
from megatron_moe2dense.trainer.flops import training_flops
from megatron_moe2dense.trainer.layout import answers, refuse
from megatron_moe2dense.trainer.model import ModelSpec

_LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "recompute")
_DAY = 86_400


def run(config: PlanConfig) -> None:
    """Print the tables and write the report.

    Raises:
        UserError: a layout that the trainer refuses or that does not fit; no layout that fits.
    """
    verdicts, left_out = decide(config)
    facts = _facts(config, verdicts, left_out)
    print(_readable(config, verdicts, left_out))
    if config.report is not None:
        write_json(Path(config.report), facts)


def dry_run(config: PlanConfig) -> dict[str, Any]:
    """The facts of the report, which is not written."""
    return _facts(config, *decide(config))


def decide(config: PlanConfig) -> tuple[list[Verdict], Counter[str]]:
    """The layouts, the fastest first (one when it is given), and how many fell out by reason."""
    machine, job = Machine(config.hardware), job_of(config)
    if config.parallel is not None:
        verdict = judge(job, machine)
        _require_room(verdict, machine)
        return [verdict], Counter()
    verdicts, left_out = search(job, machine, config.batch.micro if config.batch else None)
    if not verdicts:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.most_common())
        raise UserError(
            f"none of {left_out.total()} layouts on {job.world} x {config.hardware.gpu} ({reasons})",
            "a layout that divides and fits",
            "take more GPUs, GPUs with more memory, another batch.global, teacher.dtype fp8, or a teacher.cache in place of the teacher",
        )
    return verdicts, left_out


def job_of(config: PlanConfig) -> Job:
    """The run, on one process per GPU; UserError when student and teacher go together in no layout."""
    dtype = getattr(torch, config.dtype)
    loss, student, teacher = config.resolved_loss(), model_spec(config.student, dtype), config.teacher
    frozen = None
    if teacher is not None and teacher.live is not None:
        frozen = replace(model_spec(teacher.live, dtype), in_fp8=teacher.dtype == "fp8")
    job = Job(
        student=student,
        teacher=frozen,
        active=teacher and teacher.active,
        parallel=config.parallel or ParallelConfig(),
        batch=config.batch or BatchConfig(),
        length=config.data.sequence_length,
        world=config.world(),
        loss=loss,
        overlap=loss.trains_head()
        if config.parallel is None or config.parallel.overlap_gradients is None
        else config.parallel.overlap_gradients,
        fp8=config.fp8 is not None,
        muon=config.optim.muon is not None,
        parts=config.train.parts if config.train is not None else "all",
    )
    parts.require(job.parts, student)
    if config.parallel is None:  # else the layout is judged with them
        refuse(answers(job.of_models()))
    return job


def model_spec(place: str, dtype: torch.dtype) -> ModelSpec:
    """Of a Hugging Face directory, a config.json, or a model in the Hugging Face cache."""
    path = hub.located(place)
    path = path if path.suffix == ".json" else path / "config.json"
    return ModelSpec.of(read_json(path, "a Hugging Face directory or its config.json"), place, dtype)


def _require_room(verdict: Verdict, machine: Machine) -> None:
    if verdict.bytes <= machine.usable:
        return
    parts = ", ".join(f"{name} {_gb(value)}" for name, value in verdict.memory[verdict.worst].parts().items() if value)
    raise UserError(
        f"stage {verdict.worst} on {machine.config.gpu}, GB: {parts}",
        f"at most {_gb(machine.usable)} GB: {_gb(machine.gpu.memory)} without the reserve of {machine.config.reserve:.0%}",
        "parallel.recompute, a smaller batch.micro, more tensor, pipeline or expert parallelism; `parallel=null` suggests layouts that fit",
    )


def _facts(config: PlanConfig, verdicts: list[Verdict], left_out: Mapping[str, int]) -> dict[str, Any]:
    return {
        "gpus": config.world(),
        "flops_per_token": training_flops(*_models(verdicts[0].job)),
        "layouts": [_row(verdict, Machine(config.hardware)) for verdict in verdicts[: config.suggestions]],
        "left_out": dict(left_out),
        "best": _details(verdicts[0]),
        "run": of_run(config, verdicts[0]),
        "reads": [config.student, *([config.teacher.live] if config.teacher and config.teacher.live else [])],
        "writes": [config.report] if config.report else [],
    }


def of_run(config: PlanConfig, verdict: Verdict) -> dict[str, Any]:
    """Steps, hours and cost of this run, where its length is given, and bytes of a checkpoint and of the export."""
    job, machine = verdict.job, Machine(config.hardware)
    total = job.student.stock.parameters
    facts: dict[str, Any] = {"checkpoint_bytes": checkpoint_bytes(total, job.element), "export_bytes": total * job.element}
    length = config.train
    if length is None or (length.steps is None and length.tokens is None):
        return facts
    a_step = job.batch.global_ * job.length
    steps = length.steps or max(1, (length.tokens or 0) // a_step)
    hours = verdict.step.seconds * steps / 3600
    spent = {"hours": hours, "gpu_hours": hours * job.world, "usd": hours * job.world * machine.price}
    return {"steps": steps, "tokens": steps * a_step, **spent, **facts}


def _said_of_run(found: Mapping[str, Any]) -> str:
    sizes = f"a checkpoint {_gb(found['checkpoint_bytes'])} GB (at most, with AdamW's moments), the export {_gb(found['export_bytes'])} GB"
    if "hours" not in found:
        return f"this run: {sizes}; with train.tokens or train.steps also its hours and cost"
    spent = f"{duration(found['hours'] * 3600)}, {found['gpu_hours']:,.1f} GPU-hours, {found['usd']:,.0f} USD"
    return f"this run: {found['steps']:,} steps, {found['tokens']:,} tokens: {spent}; {sizes}"


def _to_paste(job: Job) -> str:
    """The blocks of distill that make this layout."""
    chosen = {name: getattr(job.parallel, name) for name in ("sequence", "distributed_optimizer", *_LAYOUT)}
    default = ParallelConfig()
    given = {name: value for name, value in chosen.items() if value != getattr(default, name)}
    blocks = {"parallel": given, "batch": {"micro": job.batch.micro, "global": job.batch.global_}}
    return yaml.safe_dump(blocks, default_flow_style=None, sort_keys=False, width=1000).rstrip()


def _models(job: Job) -> tuple[ModelSpec, ModelSpec | None, int, int | None]:
    return job.student, job.teacher, job.length, job.active


def _row(verdict: Verdict, machine: Machine) -> dict[str, Any]:
    job, seconds = verdict.job, verdict.step.seconds
    tokens = job.batch.global_ * job.length
    return {
        **{name: getattr(job.parallel, name) for name in _LAYOUT},
        "data": job.data,
        "micro": job.batch.micro,
        "bytes": verdict.bytes,
        "step_seconds": seconds,
        "mfu": timing.mfu(job, machine, seconds),
        "bubble": verdict.step.bubble / seconds,
        "tokens_per_second_per_gpu": tokens / seconds / job.world,
        "tokens_per_day": tokens / seconds * _DAY,
        "usd_per_billion_tokens": 1e9 / tokens * seconds / 3600 * job.world * machine.price,
    }


def _details(verdict: Verdict) -> dict[str, Any]:
    job = verdict.job
    stages = {
        str(stage): {"memory": held.parts(), "sent": communication.volume(communication.of_stage(job, stage))}
        for stage, held in verdict.memory.items()
    }
    return {"stages": stages, "step": {**vars(verdict.step), "seconds": verdict.step.seconds}, "micro_batches": job.micro_batches}


def _readable(config: PlanConfig, verdicts: list[Verdict], left_out: Mapping[str, int]) -> str:
    machine, best = Machine(config.hardware), verdicts[0]
    rows = [_row(verdict, machine) for verdict in verdicts[: config.suggestions]]
    header = ["TP", "PP", "VPP", "CP", "EP", "recompute", "DP", "micro", "GB", "step s", "MFU %", "tok/s/GPU", "Gtok/day", "USD/Gtok"]
    lines = [
        f"{config.world()} x {config.hardware.gpu}, {best.job.batch.global_} x {best.job.length} tokens a step, "
        f"{training_flops(*_models(best.job)) / 1e9:.1f} GFLOP a token",
        f"data-sheet rates x {config.hardware.efficiency}: on paper, not measured",
        "",
        render(header, [_cells(row) for row in rows]),
        "",
        _said_of_run(of_run(config, best)),
        "",
        _to_paste(best.job),
        "",
        *(f"left out {count}: {reason}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1])),
        *([""] if left_out else []),
        _memory_table(best),
        "",
        _time_table(best),
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[Any]:
    layout = [row[name] for name in (*_LAYOUT, "data", "micro")]
    numbers = [_gb(row["bytes"]), f"{row['step_seconds']:.3f}", f"{row['mfu']:.1%}".rstrip("%"), round(row["tokens_per_second_per_gpu"])]
    return [*layout, *numbers, f"{row['tokens_per_day'] / 1e9:.2f}", round(row["usd_per_billion_tokens"])]


def _memory_table(verdict: Verdict) -> str:
    stages = {stage: held.parts() for stage, held in verdict.memory.items()}
    rows = [[name, *(_gb(parts[name]) for parts in stages.values())] for name in next(iter(stages.values()))]
    return render(["GB of a GPU", *(f"stage {stage}" for stage in stages)], rows)


def _time_table(verdict: Verdict) -> str:
    sent = {stage: communication.volume(communication.of_stage(verdict.job, stage)) for stage in verdict.memory}
    kinds = sorted({kind for volume in sent.values() for kind in volume})
    seconds = render(["part of the step", "seconds"], [[name, f"{value:.4f}"] for name, value in vars(verdict.step).items()])
    if not kinds:
        return seconds
    rows = [[kind, *(_gb(volume.get(kind, 0)) for volume in sent.values())] for kind in kinds]
    return f"{seconds}\n\n" + render(["GB sent in a step", *(f"stage {stage}" for stage in sent)], rows)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"
