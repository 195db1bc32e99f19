"""A sum of losses with fixed weights: never balanced by their size, which would make the objective depend on the batch. A term may be for
the beginning of the run alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import model_validator
from torch import Tensor

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.families import Dims
from megatron_moe2dense.trainer.losses import Loss, losses
from megatron_moe2dense.trainer.losses.targets import TeacherOutput
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits


class Term(Config):
    """One loss and its weight."""

    weight: float = key(..., "factor", gt=0)
    loss: Annotated[Loss, *losses.field] = key(..., "loss block")
    until: float | None = key(None, "share of the run's steps after which it is left out; null: never", "fraction", gt=0, lt=1)


@losses.register("mixture")
class Mixture(Loss):
    """sum of weight * loss, e.g. {method: mixture, terms: [{weight: 0.9, loss: {method: forward_kl}}, ...]}."""

    terms: list[Term] = key(..., "the terms", min_length=1)

    @model_validator(mode="after")
    def _one_stays(self) -> Mixture:
        if all(term.until is not None for term in self.terms):
            raise ValueError("every term has an `until`: nothing would be left to train on")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether any term does."""
        return any(term.loss.needs_teacher for term in self.terms)

    def tokens_of_cache(self) -> int | None:
        """The most that any term needs, None when one takes a live teacher alone."""
        needs = [term.loss.tokens_of_cache() for term in self.terms]
        return None if None in needs else max(need for need in needs if need is not None)

    def trains_head(self) -> bool:
        """Whether any term that stays does."""
        return any(term.loss.trains_head() for term in self.terms if term.until is None)

    def require_models(self, student: Dims, teacher: Dims | None) -> None:
        """See `Loss.require_models`: of every term."""
        for term in self.terms:
            term.loss.require_models(student, teacher)

    def at(self, share: float) -> Loss:
        """See `Loss.at`: without the terms that are over."""
        return Mixture(terms=[term for term in self.terms if term.until is None or share < term.until])

    def per_token(self, student: VocabParallelLogits, teacher: TeacherOutput | None, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """The weighted sum, [T]."""
        values = [term.weight * term.loss.per_token(student, teacher, labels_T, mask_T) for term in self.terms]
        return sum(values[1:], values[0])
