"""What `moe2dense plan` says of two published distillation runs, and of ours on 1 to 4096 GPUs, into docs/operations.md and its figure.

Usage, from the repository's root: python -m studies.plan_tables
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_moe2dense.operations.plan.config import HardwareConfig
from megatron_moe2dense.operations.plan.hardware import Machine
from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.operations.plan.memory import Memory, of_stage
from megatron_moe2dense.operations.plan.search import search
from megatron_moe2dense.operations.plan.timing import step_time
from megatron_moe2dense.plots.style import FAINT, PALETTE, log_axis, new_figure, style
from megatron_moe2dense.trainer.config import BatchConfig, ParallelConfig
from megatron_moe2dense.trainer.losses import losses
from megatron_moe2dense.trainer.model import ModelSpec
from studies.report import markdown, put_between
from tests.families.published import QWEN3_30B_A3B, dense_config

ROOT = Path(__file__).resolve().parents[1]
SIZES = [8 << power for power in range(10)]
HEADER = ("run", "published, tok/s/GPU", "planned", "ratio")
SCALE_HEADER = ("GPUs", "batch", "TP", "PP", "VPP", "CP", "EP", "recompute", "micro", "Gtok/day", "tok/s/GPU")
ONE_GPU_HEADER = (
    "teacher",
    "parts",
    "optimizer",
    "recompute",
    "teacher, GB",
    "student",
    "gradients",
    "optimizer state",
    "rest",
    "total",
    "fits",
)
ONE_GPU = Machine(HardwareConfig(gpus=1))

# Qwen3-8B, and a student of 6B: a hidden size of 3584 and FFNs of 9216, an example of the same source.
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
QWEN3_6B = {**QWEN3_8B, "hidden_size": 3584, "intermediate_size": 9216}
# Nemotron 3 Nano 30B-A3B has Mamba and attention layers beside 23 MoE layers, and experts of two matrices, which no family here has. Its
# stand-in: 23 layers with its hidden size, experts and routing, gated experts of as many parameters, and attention as wide as makes its
# active parameters 3.6B, of the student 3.0B.
STAND_IN: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "hidden_size": 2688,
    "moe_intermediate_size": 1236,
    "shared_expert_intermediate_size": 2474,
    "num_hidden_layers": 23,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 90,
    "vocab_size": 131072,
    "num_experts": 128,
    "num_experts_per_tok": 6,
    "intermediate_size": 0,
    "max_position_embeddings": 262144,
}
STAND_IN_STUDENT = {**STAND_IN, "num_experts": 104, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 2048, "head_dim": 74}


def batch(sequences: int) -> BatchConfig:
    """So many in a step, one a micro-batch."""
    return BatchConfig.model_validate({"micro": 1, "global": sequences})


def spec_of(config: dict[str, Any]) -> ModelSpec:
    """In bfloat16."""
    return ModelSpec.of(config, "the published model", torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Published:
    """A run that somebody measured. tokens_per_second: of a GPU."""

    name: str
    job: Job
    hardware: HardwareConfig
    tokens_per_second: float

    def planned(self) -> float:
        """Tokens per second and GPU by `plan`."""
        seconds = step_time(self.job, Machine(self.hardware)).seconds
        return self.job.batch.global_ * self.job.length / seconds / self.job.world


def published() -> list[Published]:
    """Both runs of NVIDIA's Model-Optimizer examples. The first source states its layout, also inside experts; of the second the layout is
    assumed."""
    kl = losses["forward_kl"]()
    moe = Job(
        student=spec_of(STAND_IN_STUDENT),
        teacher=spec_of(STAND_IN),
        active=None,
        parallel=ParallelConfig(tensor=4, expert=8, sequence=True),
        batch=batch(3072),
        length=8192,
        world=768,
        loss=kl,
        experts_split=4,
    )
    dense = Job(
        student=spec_of(QWEN3_6B),
        teacher=spec_of(QWEN3_8B),
        active=None,
        parallel=ParallelConfig(tensor=2, sequence=True),
        batch=batch(768),
        length=4096,
        world=8,
        loss=kl,
    )
    return [
        Published("30B-A3B to 22B-A3B", moe, HardwareConfig(nodes=96), 3090),
        Published("Qwen3-8B to 6B", dense, HardwareConfig(nodes=1), 4660),
    ]


def published_rows() -> list[tuple[str, int, int, str]]:
    """Run, published and planned tokens per second and GPU, their ratio."""
    found = [(run.name, round(run.tokens_per_second), run.planned()) for run in published()]
    return [(name, measured, round(planned), f"{planned / measured:.2f}") for name, measured, planned in found]


def distillation(gpus: int) -> tuple[Job, float]:
    """The fastest layout of Qwen3-30B-A3B to its dense 3.34B student on so many H100, and its tokens per day.

    The batch grows from 0.5M tokens with the GPUs beyond 256, one sequence a GPU at least.
    """
    student = spec_of(dense_config(QWEN3_30B_A3B, 8 * 768))
    start = Job(
        student=student,
        teacher=spec_of(QWEN3_30B_A3B),
        active=None,
        parallel=ParallelConfig(),
        batch=batch(max(256, gpus)),
        length=2048,
        world=gpus,
        loss=losses["forward_kl"](),
    )
    best = search(start, Machine(HardwareConfig(nodes=gpus // 8)), None)[0][0]
    return best.job, best.job.batch.global_ * best.job.length / best.step.seconds * 86_400


def on_one_gpu(teacher: Literal["model", "fp8"], parts: str, muon: bool) -> tuple[Job, Memory]:
    """The same models on one H100, one sequence a micro-batch and 64 in a step, with as little recomputation as has room, or all of it."""
    job = Job(
        student=spec_of(dense_config(QWEN3_30B_A3B, 8 * 768)),
        teacher=dataclasses.replace(spec_of(QWEN3_30B_A3B), in_fp8=teacher == "fp8"),
        active=None,
        parallel=ParallelConfig(distributed_optimizer=not muon),
        batch=batch(64),
        length=2048,
        world=1,
        loss=losses["forward_kl"](),
        muon=muon,
        parts=parts,
    )
    for recompute in ("none", "selective", "full"):
        job = dataclasses.replace(job, parallel=job.parallel.model_copy(update={"recompute": recompute}))
        held = of_stage(job, 0)
        if held.total <= ONE_GPU.usable:
            break
    return job, held


def one_gpu_rows() -> list[list[Any]]:
    """What is chosen, the recomputation, GB by part, and whether they fit."""
    rows = []
    for teacher, parts, muon in itertools.product(("model", "fp8"), ("all", "ffn"), (False, True)):
        job, held = on_one_gpu(teacher, parts, muon)
        known = held.parameters + held.gradients + held.optimizer + held.teacher
        sizes = (held.teacher, held.parameters, held.gradients, held.optimizer, held.total - known, held.total)
        chosen = ["bf16" if teacher == "model" else "FP8", parts, "Muon" if muon else "AdamW", job.parallel.recompute]
        rows.append([*chosen, *(f"{value / 1e9:.1f}" for value in sizes), "yes" if held.total <= ONE_GPU.usable else "no"])
    return rows


def scale_rows(found: Sequence[tuple[int, Job, float]]) -> list[list[Any]]:
    """GPUs, sequences a step, the layout, and what it gives."""
    rows = []
    for gpus, job, tokens in found:
        layout = job.parallel
        shape = (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.context, layout.expert, layout.recompute, job.batch.micro)
        rows.append([gpus, job.batch.global_, *shape, f"{tokens / 1e9:.1f}", round(tokens / 86_400 / gpus)])
    return rows


def draw(points: Sequence[tuple[int, float]], file: Path) -> None:
    """Tokens per day over GPUs, beside those of 8 GPUs times their number."""
    gpus, tokens = [each for each, _ in points], [value / 1e9 for _, value in points]
    with style():
        figure = new_figure(7.0, 4.2)
        axes = figure.add_subplot()
        axes.plot(gpus, [tokens[0] / gpus[0] * each for each in gpus], color=FAINT, linestyle="--", label="8 GPUs times their number")
        axes.plot(gpus, tokens, marker="o", color=PALETTE[0], label="planned, fastest layout that fits")
        axes.set_xscale("log", base=2)
        axes.set_xticks(gpus, [str(each) for each in gpus])
        log_axis(axes)
        axes.grid(axis="y")
        axes.set_xlabel("H100 GPUs, 8 a node")
        axes.set_ylabel("billion tokens per day")
        axes.set_title("Qwen3-30B-A3B to a dense 3.34B student, on paper")
        axes.legend(loc="upper left")
        figure.savefig(file, dpi=120)


def main(document: Path, picture: Path) -> None:
    """Rewrite what stands between the document's markers, and the figure."""
    found = [(gpus, *distillation(gpus)) for gpus in SIZES]
    tables = {"published": markdown(HEADER, published_rows()), "scale": markdown(SCALE_HEADER, scale_rows(found))}
    tables["one GPU"] = markdown(ONE_GPU_HEADER, one_gpu_rows())
    for name, table in tables.items():
        put_between(document, (f"<!-- studies/plan_tables.py: {name} -->", "<!-- end -->"), table)
    draw([(gpus, tokens) for gpus, _, tokens in found], picture)


if __name__ == "__main__":
    main(ROOT / "docs/operations.md", ROOT / "docs/images/scale.png")
