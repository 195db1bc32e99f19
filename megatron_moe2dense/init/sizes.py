"""How much text there is and how a run divides it: what `init` works out before it writes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe2dense.common.errors import UserError

_BATCH, _LEAST_STEPS, _LEAST_BATCHES = 256, 500, 2
_HELD_OUT, _LARGEST_SHARE = 64, 0.1
_SAFE = 0.9  # of an estimate from the first documents


@dataclass(frozen=True)
class Sizes:
    """length: tokens of a sample. tokens: to train on, whole batches. batch: sequences a step. held_out: share of the documents, and
    spare: sequences that are surely in it."""

    length: int
    tokens: int
    batch: int
    held_out: float
    spare: int


def sizes_of(estimated: int, length: int, most: int, ranks: int) -> Sizes:
    """Of so many tokens of text.

    Args:
        estimated: tokens of the text, from its first documents. length: of a sample. most: tokens to train on. ranks: GPUs.

    Raises:
        UserError: too little text for two steps of one sequence a GPU.
    """
    least = _LEAST_BATCHES * ranks * length
    sure = int(estimated * _SAFE)
    wanted = 2 * _HELD_OUT * length  # twice, as documents come whole
    held_out = min(_LARGEST_SHARE, max(0.001, wanted / sure)) if sure else 0.0
    left = min(most, int(sure * (1 - held_out)))
    if left < least:
        raise UserError(
            f"about {estimated:,} tokens of text",
            f"at least {round(least / _SAFE / (1 - _LARGEST_SHARE)):,}: two steps of a sequence of {length} on each of {ranks} GPUs",
            "give more text, fewer hardware.gpus or a smaller sequence_length",
        )
    batch = _BATCH
    while batch > ranks and left < batch * length * _LEAST_STEPS:
        batch //= 2
    batch = max(batch, ranks)
    tokens = max(_LEAST_BATCHES, left // (batch * length)) * batch * length
    return Sizes(length, tokens, batch, round(held_out, 6), int(sure * held_out / 2 / length))


def validation(sizes: Sizes, round_: int) -> int | None:
    """Held-out sequences of an evaluation: about 64, in whole rounds of micro-batches; None where there are too few for one."""
    wanted = -(-_HELD_OUT // round_) * round_
    return wanted if wanted <= sizes.spare else sizes.spare // round_ * round_ or None
