"""Perplexity and KL against float64 numpy on stock models."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals import perplexity
from megatron_moe2dense.evals.models import load_model
from megatron_moe2dense.evals.perplexity import Loaded, measure
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, TokenFile, windows
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

TOKENS_NS = np.random.default_rng(3).integers(0, 256, (7, 24))


def load(directory: Path, name: str = "model") -> Loaded:
    return Loaded(name, load_model(CheckpointIndex.open(directory), torch.device("cpu"), "float32"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"teacher": tiny_qwen3_moe(root / "teacher"), "student": tiny_qwen3(root / "student", seed=5)}


def log_probs_float64(directory: Path) -> np.ndarray:
    """[N, S-1, V] of the stock class in float64, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        logits = np.stack([model(torch.from_numpy(window)[None]).logits[0, :-1].numpy() for window in TOKENS_NS])
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_nll_kl_and_agreement_equal_float64_of_the_stock_models(directories):
    log_p, log_q = log_probs_float64(directories["teacher"]), log_probs_float64(directories["student"])
    nll = -np.take_along_axis(log_q, TOKENS_NS[:, 1:, None], -1).mean()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    found = measure(load(directories["student"]), TOKENS_NS, 3, load(directories["teacher"]))
    assert found.positions == 7 * 23
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.agreed == (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    assert kl > 0.01, "the two models must differ for this to mean something"


@pytest.mark.parametrize("stride", [1, 10, 23])
def test_with_a_stride_the_last_tokens_of_overlapping_windows_count_as_in_a_plain_loop(directories, tmp_path, stride):
    write_tokens(tmp_path / "text", 24 + 6 * stride + (stride > 1), seed=4)
    stream = TokenFile.open(str(tmp_path / "text")).tokens.astype(np.int64)
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    models = [AutoModelForCausalLM.from_pretrained(directories[name], **options).eval() for name in ("student", "teacher")]
    nll, kl, counted = 0.0, 0.0, 0
    for begin in range(0, len(stream) - 23, stride):
        window = torch.from_numpy(stream[begin : begin + 24])[None]
        log_q, log_p = (model(window).logits[0].log_softmax(-1).detach() for model in models)
        for position in range(24 - stride, 24):  # the token that is predicted
            nll -= log_q[position - 1, window[0, position]].item()
            kl += (log_p[position - 1].exp() * (log_p[position - 1] - log_q[position - 1])).sum().item()
            counted += 1
    config = TokensConfig(path=str(tmp_path / "text"), sequence_length=24, sequences=None)
    found = measure(load(directories["student"]), windows(config, Limits(256), stride), 3, load(directories["teacher"]), stride)
    assert found.positions == counted == 7 * stride
    assert found.nll == pytest.approx(nll / counted, rel=1e-5)
    assert found.kl == pytest.approx(kl / counted, rel=1e-5)


def test_kl_of_a_model_to_an_equal_copy_is_zero(directories):
    found = measure(load(directories["teacher"]), TOKENS_NS, 4, load(directories["teacher"]))
    assert found.kl == 0.0
    assert found.top1_agreement == 1.0


def test_the_teacher_itself_is_run_once_a_batch(directories):
    teacher, calls = load(directories["teacher"]), []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    assert measure(teacher, TOKENS_NS, 7, teacher).kl == 0.0
    assert len(calls) == 1


def test_perplexity_of_uniform_logits_is_the_vocabulary(directories):
    subject = load(directories["student"])
    subject.model.lm_head.weight.zero_()
    found = measure(subject, TOKENS_NS, 2)
    assert found.perplexity == pytest.approx(256, rel=1e-6)
    assert found.kl is None
    assert found.top1_agreement is None


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
@pytest.mark.parametrize("block", [256, 256 * 11, 2**25])
def test_batch_and_block_sizes_do_not_change_the_result(directories, monkeypatch, batch, block):
    subject, teacher = load(directories["student"]), load(directories["teacher"])
    whole = measure(subject, TOKENS_NS, 7, teacher)
    monkeypatch.setattr(perplexity, "_BLOCK", block)
    found = measure(subject, TOKENS_NS, batch, teacher)
    assert found.positions == whole.positions
    assert found.nll == pytest.approx(whole.nll, rel=1e-6)
    assert found.kl == pytest.approx(whole.kl, rel=1e-5)


def test_half_precision_logits_are_compared_in_float32(directories):
    index = CheckpointIndex.open(directories["student"])
    half = Loaded("half", load_model(index, torch.device("cpu"), "bfloat16"))
    with torch.no_grad():
        logits = half.model(torch.from_numpy(TOKENS_NS)).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), torch.from_numpy(TOKENS_NS[:, 1:]).reshape(-1))
    assert measure(half, TOKENS_NS, 7).nll == pytest.approx(expected.item(), rel=1e-6)


def test_nan_logits_are_refused(directories):
    subject = load(directories["student"])
    subject.model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(UserError, match="NaN or infinite logits"):
        measure(subject, TOKENS_NS, 7)


def test_a_needed_token_of_probability_zero_is_refused(directories):
    subject = load(directories["student"])
    # The final norm leaves one coordinate, all of one sign: row 9 of the head then scores -inf everywhere.
    subject.model.model.norm.register_forward_hook(lambda _module, _inputs, output: torch.ones_like(output))
    subject.model.lm_head.weight[9] = -math.inf
    tokens = np.full((1, 5), 9)
    with pytest.raises(UserError, match="probability 0"):
        measure(subject, tokens, 1)


def test_different_vocabularies_are_refused(directories, tmp_path):
    other = load(tiny_qwen3(tmp_path / "other", vocab_size=300))
    with pytest.raises(UserError, match="same vocabulary"):
        measure(other, TOKENS_NS, 7, load(directories["teacher"]))
