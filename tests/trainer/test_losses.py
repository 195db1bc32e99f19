"""Forward KL, split over processes or not, against a plain float64 computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe2dense.trainer.losses import losses
from megatron_moe2dense.trainer.losses.shards import VocabShard
from tests.helpers.distributed import launch


def case(
    scale: float = 3.0, vocab: int = 40, columns: int = 40, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(scale) + vocab)
    student, teacher = (torch.randn(7, columns, generator=generator).mul(scale).to(dtype) for _ in range(2))
    # padding columns hold garbage that must not matter
    student[:, vocab:], teacher[:, vocab:] = 1e4, -1e4
    mask = torch.tensor([1.0, 1, 0, 1, 0, 1, 1])
    return {"student": student, "teacher": teacher, "vocab": vocab, "temperature": temperature, "weight": mask}


CASES = {
    "plain": case(),
    "temperature": case(temperature=2.5),
    "padded vocabulary": case(vocab=33),
    "a rank of padding only": case(vocab=17),
    "extreme logits": case(scale=1e4),
    "bfloat16 logits": case(dtype=torch.bfloat16),
}


def reference(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    student = case["student"].double().requires_grad_(True)
    s, t = (x[:, : case["vocab"]] / case["temperature"] for x in (student, case["teacher"].double()))
    kl_T = torch.nn.functional.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    loss_T = kl_T * case["temperature"] ** 2
    (loss_T * case["weight"]).sum().backward()
    assert student.grad is not None
    return loss_T.detach(), student.grad


def assert_equal(found: tuple[torch.Tensor, torch.Tensor], case: dict[str, Any]) -> None:
    loss_T, grad_TV = reference(case)
    # float32 logits of size 1e4 carry an error of 1e-3 themselves
    torch.testing.assert_close(found[0].double(), loss_T, rtol=2e-5, atol=1e-6 * case["student"][:, : case["vocab"]].abs().max().item())
    half = found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[1].double(), grad_TV, rtol=1e-2 if half else 1e-4, atol=1e-3 if half else 2e-6)
    assert (found[1][:, case["vocab"] :] == 0).all(), "padding columns must have no gradient"


@pytest.mark.parametrize("name", CASES)
def test_forward_kl_equals_float64_on_one_process(name: str):
    item = CASES[name]
    student = item["student"].clone().requires_grad_(True)
    shards = [VocabShard.of(x, item["vocab"], None) for x in (student, item["teacher"])]
    loss_T = losses["forward_kl"](temperature=item["temperature"]).per_token(*shards, torch.zeros(7, dtype=torch.long))
    (loss_T * item["weight"]).sum().backward()
    assert student.grad is not None
    assert_equal((loss_T.detach(), student.grad), item)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_forward_kl_is_the_same_over_tensor_parallel_ranks(processes: int):
    for found, item in zip(launch(processes, "tests.trainer.cases:forward_kl", list(CASES.values())), CASES.values(), strict=True):
        assert_equal(found, item)


def test_inputs_are_left_alone():
    item = case()
    student, teacher = item["student"].clone(), item["teacher"].clone()
    losses["forward_kl"]().per_token(VocabShard.of(student, 40, None), VocabShard.of(teacher, 40, None), torch.zeros(7))
    assert torch.equal(student, item["student"])
    assert torch.equal(teacher, item["teacher"])
