"""Every logit loss, split over processes or not, against a plain float64 computation by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import Dims
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.trainer.losses import LogitLoss, chunked, losses, measures
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits
from tests.helpers.forks import launch
from tests.helpers.tiny_models import TRUNK
from tests.trainer.cases import loss_and_gradients

TOKENS, HIDDEN = 7, 12


def forward_kl(s: Tensor, t: Tensor, _labels: Tensor) -> Tensor:
    return (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)


def reverse_kl(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return forward_kl(t, s, labels)


def jensen_shannon(s: Tensor, t: Tensor, _labels: Tensor) -> Tensor:
    p, q = s.softmax(-1), t.softmax(-1)
    middle = (p + q) / 2
    return sum((x * torch.where(x > 0, (x / middle).log(), 0.0)).sum(-1) for x in (p, q)) / 2  # type: ignore[return-value]


def cross_entropy(s: Tensor, _t: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(s, labels, reduction="none")


def top_k_kl(s: Tensor, t: Tensor, _labels: Tensor) -> Tensor:
    top = t.topk(5).indices
    log_t, log_s = (x.log_softmax(-1) for x in (t, s))
    outcomes = [
        torch.cat([x.gather(-1, top), x.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)], -1) for x in (log_t, log_s)
    ]  # five tokens and the rest
    return (outcomes[0].exp() * (outcomes[0] - outcomes[1])).sum(-1)


def mixture(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return 0.25 * forward_kl(s, t, labels) + 2.0 * cross_entropy(s, t, labels)


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "cross_entropy": cross_entropy,
    "top_k_kl": top_k_kl,
    "mixture": mixture,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "top_k_kl": {"k": 5},
    "mixture": {"terms": [{"weight": 0.25, "loss": {"method": "forward_kl"}}, {"weight": 2.0, "loss": {"method": "cross_entropy"}}]},
}
WITH_TEMPERATURE = {"forward_kl", "reverse_kl", "jensen_shannon"}
INPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "padded vocabulary": {"vocab": 33},
    "a rank of padding only": {"vocab": 17},
    "large logits": {"size": 30.0},
    "no token counts": {"mask": torch.zeros(TOKENS)},
    "bfloat16": {"dtype": torch.bfloat16},
}


def make(method: str, vocab: int = 40, temperature: float = 1.0, size: float = 1.0, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(vocab)
    dtype = options.get("dtype", torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    head, teacher_head = draw(40, HIDDEN), draw(40, HIDDEN)
    head[vocab:], teacher_head[vocab:] = 1e4, -1e4  # garbage in padding rows must not matter
    block = {"method": method, **OPTIONS.get(method, {})} | ({"temperature": temperature} if method in WITH_TEMPERATURE else {})
    return {
        "loss": block,
        "vocab": vocab,
        "hidden": draw(TOKENS, HIDDEN) * size,
        "head": head,
        "teacher_hidden": draw(TOKENS, HIDDEN) * size,
        "teacher_head": teacher_head,
        "labels": torch.randint(0, vocab, (TOKENS,), generator=generator),
        "mask": options.get("mask", torch.tensor([1.0, 1, 0, 1, 0, 1, 1])),
        "scale": 0.7,
    }


CASES = {
    f"{method}, {name}": make(method, **options)
    for method, (name, options) in itertools.product(FORMULAS, INPUTS.items())
    if name != "temperature" or method in WITH_TEMPERATURE
}
# The teacher's best nine tokens, from which a loss over five takes what it wants.
CASES |= {f"cached top_k_kl, {name}": {**make("top_k_kl", **INPUTS[name]), "cached": 9} for name in INPUTS if name != "temperature"}


def reference(case: dict[str, Any]) -> dict[str, Tensor]:
    hidden, head = case["hidden"].double().requires_grad_(True), case["head"].double().requires_grad_(True)
    temperature = case["loss"].get("temperature", 1.0)
    s = (hidden @ head[: case["vocab"]].t()) / temperature
    t = (case["teacher_hidden"].double() @ case["teacher_head"][: case["vocab"]].double().t()) / temperature
    loss_T = FORMULAS[case["loss"]["method"]](s, t, case["labels"]) * temperature**2
    ((loss_T * case["mask"]).sum() * case["scale"]).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return {"loss": loss_T.detach(), "hidden": hidden.grad, "head": head.grad}


def assert_equal(found: dict[str, Tensor], case: dict[str, Any]) -> None:
    expected = reference(case)
    # a few roundings of the largest logit; in bfloat16 the logits themselves are rounded
    hidden, head = case["hidden"].float(), case["head"][: case["vocab"]].float()
    largest = float((hidden @ head.t()).abs().max())
    tolerance = 3e-2 if case["hidden"].dtype == torch.bfloat16 else max(2e-5, 4 * torch.finfo(torch.float32).eps * largest)
    # an error in the logits' gradient reaches each of the two gradients times the other factor
    factors = {"loss": 1.0, "hidden": float(head.abs().max()), "head": float(hidden.abs().max())}
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()), factors[name])
        assert (found[name].double() - value).abs().max() < tolerance * scale, name
    assert (found["head"][case["vocab"] :] == 0).all(), "padding rows must have no gradient"


def assert_measures(found: Tensor, case: dict[str, Any]) -> None:
    """Against plain float64, at temperature 1; by a bfloat16 head the logits themselves are rounded."""
    s, t = (
        (case[hidden] @ case[head][: case["vocab"]].t()).double()
        for hidden, head in (("hidden", "head"), ("teacher_hidden", "teacher_head"))
    )
    labels, agree = case["labels"], (s.argmax(-1) == t.argmax(-1)).double()
    expected = [cross_entropy(s, t, labels), entropy(s), cross_entropy(t, s, labels), entropy(t), forward_kl(s, t, labels), agree]
    tolerance = 4 * torch.finfo(torch.float32).eps * max(10.0, float(s.abs().max()), float(t.abs().max()))
    for name, value, wanted in zip(measures.AGAINST_TEACHER, found, expected, strict=True):
        assert (value.double() - wanted).abs().max() < tolerance, name


def entropy(x: Tensor) -> Tensor:
    return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_equals_float64_on_one_process(name: str):
    assert_equal(loss_and_gradients([CASES[name]])[0], CASES[name])


@pytest.fixture(scope="module")
def over_ranks() -> list[dict[str, Tensor]]:
    """The results of all cases with the vocabulary split over processes, and last that of the loss which is not split."""
    return launch(4, "tests.trainer.cases:loss_and_gradients", [*CASES.values(), hidden_case()])


@pytest.mark.distributed
def test_a_loss_is_the_same_over_tensor_parallel_ranks(over_ranks: list[dict[str, Tensor]]):
    for result, case in zip(over_ranks[:-1], CASES.values(), strict=True):
        assert_equal(result, case)


@pytest.mark.parametrize("name", CASES)
def test_measures_equal_float64_on_one_process(name: str):
    assert_measures(loss_and_gradients([CASES[name]])[0]["measures"], CASES[name])


@pytest.mark.distributed
def test_measures_are_the_same_over_tensor_parallel_ranks(over_ranks: list[dict[str, Tensor]]):
    for result, case in zip(over_ranks[:-1], CASES.values(), strict=True):
        assert_measures(result["measures"], case)


def test_the_formulas_cover_the_registry():
    assert set(FORMULAS) | {"hidden_state"} == set(losses)
    assert not issubclass(losses["hidden_state"], LogitLoss)


@pytest.mark.parametrize("method", FORMULAS)
def test_chunks_do_not_change_the_result(method: str, monkeypatch: pytest.MonkeyPatch):
    whole = loss_and_gradients([CASES[f"{method}, plain"]])[0]
    monkeypatch.setattr(chunked, "token_slices", lambda tokens, _columns: [slice(i, i + 2) for i in range(0, tokens, 2)])
    for name, value in loss_and_gradients([CASES[f"{method}, plain"]])[0].items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", list(losses))
def test_gradients_pass_gradcheck(method: str):
    """Numeric differences in float64, of hidden states and head at once in a random direction, with masked tokens."""
    case = make(method)
    teacher = VocabParallelLogits.of(case["teacher_hidden"].double(), case["teacher_head"].double(), case["vocab"], None)
    loss, mask_T = losses.build(case["loss"]), case["mask"].double()

    class Total(torch.autograd.Function):
        """Keeps the gradients: gradcheck asks for them again and again, a loss gives them once."""

        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            with torch.enable_grad():
                hidden, head = (value.detach().requires_grad_(True) for value in inputs)
                student = VocabParallelLogits.of(hidden, head, case["vocab"], None)
                total = (loss.per_token(student, teacher if loss.needs_teacher else None, case["labels"], mask_T) * mask_T).sum()
                ctx.gradients = torch.autograd.grad(total, (hidden, head), allow_unused=True, materialize_grads=True)
            return total.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return tuple(grads[0] * gradient for gradient in ctx.gradients)

    inputs = (case["hidden"].double().requires_grad_(True), case["head"].double().requires_grad_(True))
    assert torch.autograd.gradcheck(Total.apply, inputs, rtol=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(size: float):
    """One logit of 10,000 above all others, in the student, the teacher, and both."""
    for student, teacher in itertools.product((0.0, size), repeat=2):
        head = torch.eye(4)
        row = torch.tensor([[1.0, 0, 0, 0]])
        shards = [VocabParallelLogits.of((row * x).requires_grad_(True), head, 4, None) for x in (student, teacher)]
        for method in ("forward_kl", "cross_entropy", "jensen_shannon", "reverse_kl"):
            loss_T = losses[method]().per_token(shards[0], shards[1], torch.tensor([1]), torch.ones(1))
            assert torch.isfinite(loss_T).all()


def test_equal_distributions_have_no_divergence_and_no_gradient():
    case = {**CASES["forward_kl, plain"], "teacher_hidden": CASES["forward_kl, plain"]["hidden"]}
    case["teacher_head"] = case["head"]
    for method in ("forward_kl", "reverse_kl", "jensen_shannon"):
        found = loss_and_gradients([{**case, "loss": {"method": method}}])[0]
        assert found["loss"].abs().max() < 1e-5
        assert found["head"].abs().max() < 1e-5


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_measures_of_extreme_logits_are_finite(size: float):
    head, row = torch.eye(4), torch.tensor([[1.0, 0, 0, 0]])
    for student, teacher in itertools.product((0.0, size), repeat=2):
        shards = [VocabParallelLogits.of(row * x, head, 4, None) for x in (student, teacher)]
        assert torch.isfinite(measures.per_token(shards[0], shards[1], torch.tensor([1]))).all()


def test_measures_without_a_teacher_are_those_of_the_student():
    case = CASES["forward_kl, plain"]
    student = VocabParallelLogits.of(case["hidden"], case["head"], 40, None)
    teacher = VocabParallelLogits.of(case["teacher_hidden"], case["teacher_head"], 40, None)
    both = measures.per_token(student, teacher, case["labels"])
    torch.testing.assert_close(measures.per_token(student, None, case["labels"]), both[: len(measures.ALONE)])


def test_inputs_are_left_alone():
    case = CASES["forward_kl, plain"]
    before = {name: value.clone() for name, value in case.items() if isinstance(value, Tensor)}
    loss_and_gradients([case])
    assert all(torch.equal(value, case[name]) for name, value in before.items())


def test_another_weighting_than_the_mask_is_an_error():
    """The gradient is formed with the mask in the forward pass; anything else would be silently wrong."""
    case = CASES["forward_kl, plain"]
    student = VocabParallelLogits.of(case["hidden"].clone().requires_grad_(True), case["head"].clone(), 40, None)
    teacher = VocabParallelLogits.of(case["teacher_hidden"], case["teacher_head"], 40, None)
    loss_T = losses["forward_kl"]().per_token(student, teacher, case["labels"], case["mask"])
    with pytest.raises(AssertionError, match="multiple"):
        (loss_T * torch.arange(TOKENS)).sum().backward()


def hidden_case() -> dict[str, Any]:
    return {**make("cross_entropy"), "loss": {"method": "hidden_state"}}


def assert_hidden_state(found: dict[str, Tensor]) -> None:
    case = hidden_case()
    difference = case["hidden"].double() - case["teacher_hidden"].double()
    torch.testing.assert_close(found["loss"].double(), difference.square().mean(-1), rtol=1e-5, atol=1e-6)
    expected = 2 * difference / HIDDEN * case["mask"][:, None] * case["scale"]
    torch.testing.assert_close(found["hidden"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_hidden_state_loss_is_the_mean_squared_error():
    assert_hidden_state(loss_and_gradients([hidden_case()])[0])


@pytest.mark.distributed
def test_the_hidden_state_loss_is_not_multiplied_by_the_ranks_that_share_it(over_ranks: list[dict[str, Tensor]]):
    assert_hidden_state(over_ranks[-1])


def sizes(**changed: int) -> Dims:
    return Stock.of({"model_type": "qwen3", **TRUNK, **changed}, "the test").dims


def test_the_hidden_state_loss_refuses_another_width():
    narrow, wide = (sizes(hidden_size=size) for size in (64, 96))
    mixed = {"method": "mixture", "terms": [{"weight": 0.5, "loss": {"method": name}} for name in ("forward_kl", "hidden_state")]}
    for loss in (losses["hidden_state"](), losses.build(mixed)):
        loss.require_models(narrow, narrow)
        with pytest.raises(UserError, match="hidden sizes 64 and 96"):
            loss.require_models(narrow, wide)


def test_a_top_k_beyond_the_vocabulary_is_refused():
    dims = sizes()
    losses.build({"method": "top_k_kl", "k": 256}).require_models(dims, None)
    with pytest.raises(UserError, match="at most the vocabulary of 256"):
        losses.build({"method": "top_k_kl", "k": 257}).require_models(dims, None)
