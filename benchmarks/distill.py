"""Distillation speed on the example, in one process and one run; lines `name value unit goal`.

This trainer over a hand-written transformers loop doing the same, and a distillation step over its parts: the teacher's forward pass
with its logits, the student's forward and backward pass with cross-entropy. The same models, micro-batch and threads, in turns.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.outputs import read_json, write_json
from megatron_moe2dense.families.dense import DenseForm
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.trainer import distill, runtime
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.samples import Batch
from megatron_moe2dense.trainer.loop import Trainer
from megatron_moe2dense.trainer.losses import losses
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits
from megatron_moe2dense.trainer.step import Models, student_pass

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/pico_moe"
LENGTH, MICRO, STEPS, ROUNDS = 256, 8, 2, 20


def dense_student(folder: Path) -> Path:
    """A random dense model of the shape that `convert` gives the example's teacher."""
    content = read_json(EXAMPLE / "model/config.json", "the example's config")
    active = content["num_experts_per_tok"] * content["moe_intermediate_size"]
    write_json(folder / "config.json", DenseForm(Stock.read(EXAMPLE / "model")).of(active).config(content))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def plain_loop(student_dir: Path) -> Callable[[], None]:
    """The loop one writes by hand: full logits, torch's kl_div and AdamW."""
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32).train()
    teacher = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model", dtype=torch.float32).eval()
    adam = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95))
    stream = torch.from_numpy(TokenFile.open(str(EXAMPLE / "tokens/distill")).tokens[: 64 * MICRO * LENGTH].astype("int64"))
    batches = iter(stream.view(-1, MICRO, LENGTH))

    def step() -> None:
        tokens = next(batches)
        with torch.no_grad():
            target = teacher(input_ids=tokens).logits.log_softmax(-1).flatten(0, 1)
        logits = student(input_ids=tokens).logits.log_softmax(-1).flatten(0, 1)
        torch.nn.functional.kl_div(logits, target, log_target=True, reduction="batchmean").backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def main() -> None:
    """Print both ratios."""
    with tempfile.TemporaryDirectory() as folder:
        student = dense_student(Path(folder) / "student")
        settings = {
            "student": str(student),
            "teacher": str(EXAMPLE / "model"),
            "output": f"{folder}/run",
            "data": {"path": str(EXAMPLE / "tokens/distill"), "sequence_length": LENGTH},
            "batch": {"micro": MICRO, "global": MICRO},
            "train": {"steps": 1 + STEPS * ROUNDS, "save_every": 10_000},
            "dtype": "float32",
        }
        config = build(DistillConfig, settings, "the benchmark")
        with runtime.session("auto") as device, process_groups.initialized(config.parallel, 0) as groups:
            distill.claim_output(config)
            trainer, state = distill.build(config, groups, device)

            def ours() -> None:
                trainer.advance(state)

            ratios = [seconds[1] / seconds[0] for seconds in in_turns(ours, plain_loop(student))]
            batches = trainer.training.micro_batches(0, MICRO)
            parts = [(sum(seconds[1:]), seconds[0]) for seconds in in_turns(*parts_of_a_step(trainer, batches))]
    print(f"distill_speed_over_transformers_loop {statistics.median(ratios):.2f} ratio >=1.0")
    print(f"distill_step_over_its_parts {statistics.median(whole / alone for alone, whole in parts):.2f} ratio <=1.10")


def parts_of_a_step(trainer: Trainer, batches: list[Batch]) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """Gradients of one distillation step; the teacher's forward pass alone; the student's alone, with cross-entropy."""
    teacher = trainer.models.teacher
    assert teacher is not None
    alone = dataclasses.replace(trainer.models, teacher=None)

    def gradients(models: Models, loss: str) -> None:
        for chunk in models.wrapped:
            chunk.zero_grad_buffer()
        student_pass(models, [losses[loss]()], batches, trainer.groups)

    def teacher_forward() -> None:
        with torch.no_grad():
            for target in teacher.targets(batches):
                shard = teacher.output(target)
                assert isinstance(shard, VocabParallelLogits)
                shard.logits(slice(None))

    return lambda: gradients(trainer.models, "forward_kl"), teacher_forward, lambda: gradients(alone, "cross_entropy")


def in_turns(*steps: Callable[[], None]) -> list[list[float]]:
    """Seconds of every step in every round, after a first call of each; a round's ratios do not depend on the machine's speed then."""
    for step in steps:
        step()
    return [[time_of(step) for step in steps] for _ in range(ROUNDS)]


def time_of(step: Callable[[], None]) -> float:
    """Seconds of STEPS calls."""
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
