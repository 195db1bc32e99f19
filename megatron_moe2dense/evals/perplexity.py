"""Perplexity of a causal model on token windows, and KL(teacher || model) in the same pass (the loss of paper Eq 5, measured)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.progress import Progress
from megatron_moe2dense.compute.ranks import Ranks

# Largest float32 block of log-probabilities [tokens, V] that is alive at once, in elements (128 MiB each).
_BLOCK = 2**25


@dataclass(frozen=True)
class Measured:
    """Sums over all counted positions of all windows (S - 1 a window unless fewer count), accumulated in float64.

    positions: how many. nll_sum, kl_sum: nats. agreed: positions where teacher and model have the same most probable token.
    kl_sum and agreed are None without a teacher.
    """

    positions: int
    nll_sum: float
    kl_sum: float | None = None
    agreed: int | None = None

    def over(self, ranks: Ranks) -> Measured:
        """The sums over all processes of a job."""
        own = {name: np.array([float(value)]) for name, value in vars(self).items() if value is not None}
        found = {name: float(value[0]) for name, value in ranks.sum(own).items()}
        counts = {name: round(found[name]) for name in ("positions", "agreed") if name in found}
        return Measured(**{**found, **counts})

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the next token, nats."""
        return self.nll_sum / self.positions

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where it leaves the float range."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def kl(self) -> float | None:
        """Mean KL(teacher || model) of a predicted position, nats."""
        return None if self.kl_sum is None else self.kl_sum / self.positions

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions where both find the same token most probable."""
        return None if self.agreed is None else self.agreed / self.positions


@dataclass(frozen=True)
class Loaded:
    """A model with the name used in messages and bars."""

    name: str
    model: PreTrainedModel


@torch.inference_mode()
def measure(
    subject: Loaded, windows_NS: np.ndarray, batch_windows: int, teacher: Loaded | None = None, stride: int | None = None
) -> Measured:
    """Run `subject` (and `teacher`, on the same batches) over windows, int64 [N, S].

    stride: only predictions of the last so many tokens of each window count (None: of all that are predicted, S - 1), so with
    windows that start `stride` tokens apart a token counts once, seen from at least S - stride tokens before it.
    Logits are taken in float32; the vocabulary is worked through in blocks of tokens, so memory beyond the models' own
    logits stays bounded.

    Raises:
        UserError: a model returns NaN or infinite values, or the vocabularies differ.
    """
    nll_sum, kl_sum, agreed, positions = 0.0, 0.0, 0, 0
    first = 0 if stride is None else windows_NS.shape[1] - stride - 1
    assert first >= 0, "a stride of a whole window or more has no tokens before it"
    shown = Progress(subject.name, "window", len(windows_NS))
    for start in range(0, len(windows_NS), batch_windows):
        tokens_BS = torch.from_numpy(windows_NS[start : start + batch_windows]).to(subject.model.device)
        logits_TV = _logits(subject, tokens_BS)
        teacher_TV = None if teacher is None else logits_TV if teacher.model is subject.model else _logits(teacher, tokens_BS)
        if teacher is not None and teacher_TV is not None:
            _check_vocabulary(subject, logits_TV, teacher, teacher_TV)
        # Row t predicts token t + 1; the last token of a window predicts nothing we know.
        rows_T = torch.arange(tokens_BS.numel(), device=tokens_BS.device).view(tokens_BS.shape)[:, first:-1].reshape(-1)
        targets_T = tokens_BS.reshape(-1)[rows_T + 1]
        for block in zip(rows_T.split(_tokens_a_block(logits_TV)), targets_T.split(_tokens_a_block(logits_TV)), strict=True):
            log_q = _log_probs(logits_TV[block[0]], subject)
            nll_sum -= log_q.gather(1, block[1][:, None]).double().sum().item()
            if teacher is not None and teacher_TV is not None:
                log_p = _log_probs(teacher_TV[block[0].to(teacher_TV.device)], teacher).to(log_q.device)
                agreed += int((log_p.argmax(1) == log_q.argmax(1)).sum())
                kl_sum += (log_p.exp() * (log_p - log_q)).sum(1).double().sum().item()
        positions += len(targets_T)
        shown.update(len(tokens_BS), tokens_BS.numel())
    shown.close()
    if not math.isfinite(nll_sum) or not math.isfinite(kl_sum):
        raise UserError(f"{subject.name}: nll {nll_sum}, KL {kl_sum}", "finite sums", "a needed token has probability 0: check the weights")
    return Measured(positions, nll_sum) if teacher is None else Measured(positions, nll_sum, kl_sum, agreed)


def _tokens_a_block(logits_TV: torch.Tensor) -> int:
    return max(1, _BLOCK // logits_TV.shape[1])


def _logits(loaded: Loaded, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits after every token of each window, [B*S, V], in the model's dtype."""
    logits_BSV = loaded.model(input_ids=tokens_BS, use_cache=False).logits
    return logits_BSV.view(-1, logits_BSV.shape[-1])


def _log_probs(logits_TV: torch.Tensor, loaded: Loaded) -> torch.Tensor:
    if torch.isnan(logits_TV).any() or torch.isposinf(logits_TV).any():
        do = "check its weights, or use dtype=float32 (float16 overflows)"
        raise UserError(f"{loaded.name}: NaN or infinite logits", "finite logits", do)
    return torch.log_softmax(logits_TV.float(), dim=-1)


def _check_vocabulary(subject: Loaded, logits_TV: torch.Tensor, teacher: Loaded, teacher_TV: torch.Tensor) -> None:
    if teacher_TV.shape != logits_TV.shape:
        raise UserError(
            f"{subject.name} has {logits_TV.shape[1]} logits a token, {teacher.name} {teacher_TV.shape[1]}",
            "teacher and model with the same vocabulary",
            "compare models that share a tokenizer",
        )
