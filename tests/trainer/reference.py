"""One distillation step in plain PyTorch: stock transformers models, torch's AdamW, one process, float32. And what a run of the trainer
must have in common with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.tokens.indexed import TokenFile
from tests.trainer.stock import muon_and_adamw, optimizer

LENGTH, SAMPLES, LR = 32, 8, 1e-3
_MEASURE_OF = {"eval_loss": "cross_entropy"}


@dataclass(frozen=True)
class Reference:
    """measures_before, measures_after: what a training row and an evaluation on the same text say, before and after the update."""

    loss: float
    grad_norm: float
    weights: dict[str, torch.Tensor]
    measures_before: dict[str, float]
    measures_after: dict[str, float]


def one_step(
    student_dir: Path, teacher_dir: Path | None, prefix: str, trains: Callable[[str], bool] | None = None, muon: bool = False
) -> Reference:
    """All samples of the file in one batch, so that their order does not matter; clip 1.0, weight decay 0.1 on matrices. Biases are
    none, though those of an only expert have two axes. trains: by name, None: all. muon: as `stock.muon_and_adamw`."""
    tokens = torch.from_numpy(TokenFile.open(prefix).tokens.astype("int64"))
    count = (len(tokens) - 1) // LENGTH
    inputs, labels = tokens[: count * LENGTH].view(count, LENGTH), tokens[1 : count * LENGTH + 1].view(count, LENGTH)
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trains is None or trains(name))
    logits, target = student(input_ids=inputs).logits.flatten(0, 1), None
    if teacher_dir is None:
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
    else:
        with torch.no_grad():
            target = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)(input_ids=inputs).logits.flatten(0, 1)
        loss = torch.nn.functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    for each in muon_and_adamw(student, LR, LR) if muon else [optimizer(student, LR)]:
        each.step()
    with torch.no_grad():
        after = student(input_ids=inputs).logits.flatten(0, 1)
    measured = [_measures(x.detach().double(), None if target is None else target.double(), labels.flatten()) for x in (logits, after)]
    return Reference(loss.item(), norm.item(), {name: p.detach() for name, p in student.named_parameters()}, *measured)


def _measures(s: torch.Tensor, t: torch.Tensor | None, labels: torch.Tensor) -> dict[str, float]:
    def entropy(x: torch.Tensor) -> torch.Tensor:
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)

    values = {"cross_entropy": torch.nn.functional.cross_entropy(s, labels), "student_entropy": entropy(s)}
    if t is not None:
        values |= {"teacher_cross_entropy": torch.nn.functional.cross_entropy(t, labels), "teacher_entropy": entropy(t)}
        values |= {"kl": (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)}
        values |= {"top1_agreement": (s.argmax(-1) == t.argmax(-1)).double()}
    return {name: float(value.mean()) for name, value in values.items()}


def step_config(root: Path, models: tuple[str, str | None], output: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Config of one step over `root`/tokens. models: folders of student and teacher in `root`."""
    student, teacher = models
    return {
        "student": str(root / student),
        "teacher": str(root / teacher) if teacher else None,
        "output": str(output),
        "data": {
            "path": str(root / "tokens"),
            "validation": str(root / "tokens"),
            "validation_sequences": SAMPLES,
            "sequence_length": LENGTH,
        },
        "parallel": parallel,
        "optim": {"lr": LR},
        "schedule": {"style": "constant", "warmup": 0.0},
        "batch": {"micro": 2, "global": SAMPLES},
        "train": {"steps": 1},
        # The teacher's weights are random. That its forward pass is stock transformers' one layout shows as well as all.
        "teacher_check": {"loss_bound": None, "stock_forward": "auto" if set(parallel) <= {"expert"} else "never"} if teacher else None,
        "dtype": "float32",
    }


def assert_same(run: Path, expected: Reference) -> None:
    """Loss, gradient norm and measures of the run's first step, its evaluation, and its exported weights, by stock transformers."""
    row, evaluation = records.read(run / "metrics.jsonl")
    assert_measures(row, expected.measures_before)
    assert_measures(
        {_MEASURE_OF.get(name, name.removeprefix("eval_")): value for name, value in evaluation.items()}, expected.measures_after
    )
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
    target = run.parent / f"{run.name} exported"
    export.run(build(ExportConfig, {"checkpoint": str(run), "output": str(target), "dtype": "float32"}, "the test"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert found.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        difference = torch.linalg.vector_norm(found[name].double() - weight.double())
        assert difference <= 1e-5 * torch.linalg.vector_norm(weight.double()), f"{name}: {difference}"


def assert_measures(found: dict[str, Any], expected: dict[str, float]) -> None:
    """Equal but for rounding, which may also turn the most likely token of one of the tokens."""
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1 / (LENGTH * SAMPLES) if name == "top1_agreement" else 0.0), name
