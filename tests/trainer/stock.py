"""Distillation steps in plain PyTorch: stock transformers models, torch's AdamW, one process, float32."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


@dataclass(frozen=True)
class Samples:
    """All samples of one step: tokens, next tokens, and 1.0 where a prediction counts; [G, S] each."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor


LEAST_MARGIN = 5e-5  # of router logits of size 0.5: rounding is 1e-6 of them at first, and some 1e-5 after an update


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


@dataclass(frozen=True)
class Balance:
    """Balancing losses of a MoE: their coefficients, and samples in a micro-batch, of which each is a mean."""

    aux_loss: float
    z_loss: float
    micro: int


def train(
    models: tuple[Path, Path | None, Balance | None], steps: Sequence[Samples], rates: tuple[float, float | None], directory: Path
) -> StockRun:
    """All samples of a step in one batch; clip 1.0, weight decay 0.1 on matrices. models: student, teacher, balancing losses.
    rates: AdamW's, and Muon's where it takes part.

    Raises AssertionError where rounding, which differs between CPUs and layouts, could choose an expert: no tolerance covers that.
    """
    student_dir, teacher_dir, balance = models
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32) if teacher_dir is not None else None
    optimizers, losses, norms = [optimizer(student, rates[0])] if rates[1] is None else muon_and_adamw(student, *rates), [], []
    for number, samples in enumerate(steps, 1):
        margin = min(choice_margin(model, samples.tokens) for model in (student, teacher) if model is not None)
        assert margin > LEAST_MARGIN, f"two experts are equal but for {margin:.1e} at step {number}: take another text"
        student.zero_grad()
        step_loss = loss(student, teacher, samples)
        (step_loss + (balancing(student, samples, balance) if balance else 0.0)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item())
        losses.append(step_loss.item())
        gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in student.named_parameters()}
        _save(student, gradients, directory / f"gradients_{number}")
        for each in optimizers:
            each.step()
    _save(student, dict(student.named_parameters()), directory / "weights")
    return StockRun(tuple(losses), tuple(norms), directory)


@torch.no_grad()
def choice_margin(model: PreTrainedModel, tokens: Tensor) -> float:
    """The least distance, over all layers and tokens, between the router logits of the last expert chosen and the first one not."""
    chosen = getattr(model.config, "num_experts_per_tok", None)
    if chosen is None:
        return float("inf")
    sorted_TE = [x.sort(-1, descending=True).values for x in model(input_ids=tokens, output_router_logits=True).router_logits]
    return min((x[:, chosen - 1] - x[:, chosen]).min().item() for x in sorted_TE)


def optimizer(student: PreTrainedModel, lr: float, leave_out: Collection[str] = ()) -> torch.optim.AdamW:
    """Weight decay 0.1 on all but vectors and biases."""
    decays = {name: p.dim() > 1 and not name.endswith("bias") for name, p in student.named_parameters() if name not in leave_out}
    matrices, vectors = ([p for name, p in student.named_parameters() if decays.get(name) is decay] for decay in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)


def muon_and_adamw(student: PreTrainedModel, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """torch's Muon for the matrices of the layers, with the exact effect of its iterations on singular values in float64."""
    layers = {name: p for name, p in student.named_parameters() if p.dim() == 2 and ".layers." in name}
    muon = torch.optim.Muon(layers.values(), lr=muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    step = muon.step

    def exact_step() -> None:
        with patch("torch.optim._muon._zeropower_via_newtonschulz", _polynomials):
            step()

    muon.step = exact_step  # type: ignore[method-assign]
    return [optimizer(student, lr, leave_out=layers), muon]


def _polynomials(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    values = values / values.norm().clamp(min=eps)
    for _ in range(steps):
        values = sum(factor * values**power for factor, power in zip(coefficients, (1, 3, 5), strict=True))
    return (left * values @ right).to(gradient.dtype)


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


def balancing(student: PreTrainedModel, samples: Samples, wanted: Balance) -> Tensor:
    """Mean over micro-batches of the sum over layers: the Switch Transformer's load balancing (stock's is top-k times it), and the mean
    square of the logsumexp of the router's logits."""
    total, batches = torch.zeros(()), samples.tokens.split(wanted.micro)
    for tokens in batches:
        for logits_TE in student(input_ids=tokens, output_router_logits=True).router_logits:
            chosen = student.config.num_experts_per_tok
            total = total + wanted.aux_loss * load_balancing_loss_func((logits_TE,), logits_TE.shape[1], chosen) / chosen
            total = total + wanted.z_loss * logits_TE.logsumexp(-1).square().mean()
    return total / len(batches)


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
