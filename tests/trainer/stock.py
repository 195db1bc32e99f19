"""Distillation steps in plain PyTorch: stock transformers models, torch's AdamW, one process, float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Samples:
    """All samples of one step: tokens, next tokens, and 1.0 where a prediction counts; [G, S] each."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class StockRun:
    """What every step gave.

    Attributes:
        losses, norms: per token; of the gradient before clipping, one a step.
        directory: `gradients_1/`, ... (after clipping) and `weights/` (after the last step), as Hugging Face checkpoints.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    directory: Path


def train(student_dir: Path, teacher_dir: Path | None, steps: Sequence[Samples], lr: float, directory: Path) -> StockRun:
    """All samples of a step in one batch; clip 1.0, weight decay 0.1 on matrices."""
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32) if teacher_dir is not None else None
    adamw, losses, norms = optimizer(student, lr), [], []
    for number, samples in enumerate(steps, 1):
        adamw.zero_grad()
        step_loss = loss(student, teacher, samples)
        step_loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item())
        losses.append(step_loss.item())
        gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in student.named_parameters()}
        _save(student, gradients, directory / f"gradients_{number}")
        adamw.step()
    _save(student, dict(student.named_parameters()), directory / "weights")
    return StockRun(tuple(losses), tuple(norms), directory)


def optimizer(student: PreTrainedModel, lr: float) -> torch.optim.AdamW:
    """Weight decay 0.1 on all but vectors and biases."""
    decays = {name: p.dim() > 1 and not name.endswith("bias") for name, p in student.named_parameters()}
    matrices, vectors = ([p for name, p in student.named_parameters() if decays[name] == decay] for decay in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)


def loss(student: PreTrainedModel, teacher: PreTrainedModel | None, samples: Samples) -> Tensor:
    """Mean over the unmasked tokens: KL(teacher || student), or the next-token loss without a teacher."""
    logits = student(input_ids=samples.tokens).logits.flatten(0, 1)
    if teacher is None:
        loss_T = torch.nn.functional.cross_entropy(logits, samples.labels.flatten(), reduction="none")
    else:
        with torch.no_grad():
            target = teacher(input_ids=samples.tokens).logits.flatten(0, 1).log_softmax(-1)
        loss_T = torch.nn.functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
    mask_T = samples.mask.flatten()
    return (loss_T * mask_T).sum() / mask_T.sum()


def _save(model: PreTrainedModel, tensors: dict[str, Tensor], directory: Path) -> None:
    """Under the names of the model's checkpoints (stock classes hold the experts of a layer as one tensor)."""
    directory.mkdir(parents=True)
    with torch.no_grad():
        keep = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
        model.save_pretrained(directory)
        for name, parameter in model.named_parameters():
            parameter.copy_(keep[name])
