"""The smoke run: doctor, parity, kernels, then short distillations of the pico MoE, each in processes of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_moe2dense.common import records
from megatron_moe2dense.common.outputs import read_json, write_json
from megatron_moe2dense.operations.smoke.parity import Side, compare, kernels
from megatron_moe2dense.operations.smoke.report import Row, exit_code, report
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig

EXAMPLE = Path("examples/pico_moe")
# FP8 products want sizes that divide by 16 on every rank; the example's 680 does not.
_WIDTH = 672
_SEQUENCES, _LENGTH, _SHOWN = 4, 256, 12
# Part of the names that kernels of matrix products and of fused attention have in cuBLAS, CUTLASS, cuDNN and flash-attn.
_FAMILIES = {"matrix products": ("gemm", "cutlass", "nvjet", "wgmma"), "fused attention": ("flash", "fmha", "sdpa", "cudnn")}
_LAYOUTS = {
    "tensor 2": "parallel={tensor: 2, sequence: true}",
    "pipeline 2": "parallel={pipeline: 2}",
    "expert 2": "parallel={expert: 2}",
}


@dataclass(frozen=True)
class Trial:
    """One short distillation. settings: of `distill`, besides those of all trials."""

    name: str
    processes: int
    steps: int
    settings: tuple[str, ...] = ()


def main(output: Path) -> int:
    """Run everything that the GPUs here allow, print the table, return the exit code: 0 passed, 1 failed, 2 no GPU."""
    if not torch.cuda.is_available():
        print("gpu_smoke: no GPU that torch can use; `moe2dense doctor` says what is there", file=sys.stderr)
        return 2
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    rows = [command_row("doctor", [sys.executable, "-m", "megatron_moe2dense", "doctor"])]
    rows += _in_this_process()
    for trial in trials(torch.cuda.device_count(), torch.cuda.get_device_capability(0)):
        rows += distilled(trial, output)
    text = report(rows)
    (output / "report.txt").write_text(text + "\n")
    print(text)
    return exit_code(rows)


def trials(gpus: int, capability: tuple[int, int]) -> list[Trial]:
    """The runs for so many GPUs; with FP8 where tensor cores have it."""
    alone = [Trial("1 GPU", 1, 50)]
    if capability >= (8, 9):
        alone.append(Trial("1 GPU, FP8", 1, 10, ("fp8={}",)))
    return alone + ([Trial(f"2 GPUs, {name}", 2, 10, (layout,)) for name, layout in _LAYOUTS.items()] if gpus > 1 else [])


def sample(device: torch.device) -> torch.Tensor:
    """The first sequences of the example's text [B, S + 1]."""
    tokens = TokenFile.open(str(EXAMPLE / "tokens/heldout")).tokens[: _SEQUENCES * (_LENGTH + 1)]
    return torch.from_numpy(tokens.astype("int64")).view(_SEQUENCES, -1).to(device)


def _in_this_process() -> list[Row]:
    parallel = ParallelConfig()
    with runtime.session("cuda") as chosen, process_groups.initialized(parallel, seed=0) as groups:
        if not chosen.transformer_engine:
            return [Row("Transformer Engine", "not installed", False, "installed")]
        local = dataclasses.replace(chosen, transformer_engine=False)
        sides = (Side("Transformer Engine", chosen, torch.bfloat16), Side("local", local, torch.bfloat16))
        tokens_BS, model = sample(chosen.device), EXAMPLE / "model"
        rows = compare(model, tokens_BS, sides, groups)
        return rows + kernel_rows(kernels(model, tokens_BS, sides[0], groups))


def kernel_rows(names: Sequence[str]) -> list[Row]:
    """A row for each family of kernels that has to be among `names`; the longest-running are printed."""
    print("\n".join(["kernels, longest first:", *(f"  {name[:120]}" for name in names[:_SHOWN])]))
    rows = []
    for family, words in _FAMILIES.items():
        found = next((name for name in names if any(word in name.lower() for word in words)), None)
        rows.append(Row(f"kernels of {family}", (found or "none")[:60], found is not None, f"one of {', '.join(words)}"))
    return rows


def command_row(name: str, command: Sequence[str]) -> Row:
    """Run a command with its output on ours; it passes with exit code 0."""
    code = subprocess.run(command, check=False).returncode
    return Row(name, f"exit code {code}", code == 0, "exit code 0")


def distilled(trial: Trial, output: Path, device: str = "cuda") -> list[Row]:
    """Train a random dense student on the pico MoE for a few steps: it ends, its loss falls, no step is skipped; and how fast it was."""
    student = output / "student"
    if not student.exists():
        student.mkdir(parents=True)
        content = read_json(EXAMPLE / "build/dense_config.json", "the example's dense model")
        write_json(student / "config.json", content | {"intermediate_size": _WIDTH})
        shutil.copyfile(EXAMPLE / "model/tokenizer.json", student / "tokenizer.json")
    run = output / trial.name.replace(", ", "_").replace(" ", "_")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(trial.processes)]
    settings = {
        "student": student,
        "teacher": EXAMPLE / "model",
        "output": run,
        "initialize": "random",
        "data": json.dumps({"path": str(EXAMPLE / "tokens/distill"), "sequence_length": _LENGTH}),
        "batch": "{micro: 8, global: 16}",
        "optim.lr": "3e-3",
        "train.steps": trial.steps,
        "device": device,
    }
    command = [*torchrun, "-m", "megatron_moe2dense", "distill", *(f"{key}={value}" for key, value in settings.items()), *trial.settings]
    ended = command_row(f"distill, {trial.name}", command)
    if not ended.passed:
        return [ended]
    steps = [row for row in records.read(run / "metrics.jsonl") if "loss" in row]
    first, last, skipped = steps[0]["loss"], steps[-1]["loss"], steps[-1]["skipped_total"]
    speed = statistics.median(row["tokens_per_second"] for row in steps[len(steps) // 2 :])
    return [
        ended,
        Row(f"loss, {trial.name}", f"{first:.3f} to {last:.3f}, {skipped} skipped", last < first and not skipped, "falls, 0 skipped"),
        Row(f"throughput, {trial.name}", f"{speed:.0f} tokens/s"),
    ]
