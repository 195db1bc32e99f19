"""One distillation step in plain PyTorch: stock transformers models, torch's AdamW, one process, float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.tokens.indexed import TokenFile


@dataclass(frozen=True)
class Reference:
    loss: float
    grad_norm: float
    weights: dict[str, torch.Tensor]


def one_step(student_dir: Path, teacher_dir: Path | None, prefix: str, length: int, lr: float) -> Reference:
    """All samples of the file in one batch, so that their order does not matter; clip 1.0, weight decay 0.1 on matrices."""
    tokens = torch.from_numpy(TokenFile.open(prefix).tokens.astype("int64"))
    count = (len(tokens) - 1) // length
    inputs, labels = tokens[: count * length].view(count, length), tokens[1 : count * length + 1].view(count, length)
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    logits = student(input_ids=inputs).logits.flatten(0, 1)
    if teacher_dir is None:
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
    else:
        with torch.no_grad():
            target = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)(input_ids=inputs).logits.flatten(0, 1)
        loss = torch.nn.functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8).step()
    return Reference(loss.item(), norm.item(), {name: p.detach() for name, p in student.named_parameters()})
