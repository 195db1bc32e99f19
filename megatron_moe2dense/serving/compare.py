"""What engines answered, beside what stock transformers answers in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_moe2dense.common.table import render

# Log-probabilities below this [nats] are no number of every engine: some give minus infinity.
_FLOOR = -80.0
Verdict = Literal["same", "different", "not served", "measured"]


@dataclass(frozen=True)
class Row:
    """An engine's answer. difference: largest of a next-token log-probability [nats]; kl: largest of the next token to float32 [nats];
    greedy: prompts whose continuation is the same (a tie counts); tokens: texts whose tokens are. speed: tokens a second."""

    engine: str
    model: str
    weights: str
    version: str = ""
    verdict: Verdict = "measured"
    reason: str = ""
    difference: float | None = None
    kl: float | None = None
    greedy: str = ""
    tokens: str = ""
    speed: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_bytes: int | None = None


def judged(row: Row, reference: dict[str, Any], answer: dict[str, Any], bounds: tuple[float | None, float | None]) -> Row:
    """Compare an answer with the reference.

    Args:
        row: engine, model and weights. bounds: of the largest difference and of the KL [nats]; None: not judged by it. With a bound of the
            difference, greedy tokens are judged too: where they part, the reference's two best have to be as near as that.
    """
    pairs = [(_tensor(meant), _tensor(found)) for meant, found in zip(reference["logprobs"], answer["logprobs"], strict=True)]
    difference = max(_difference(*pair) for pair in pairs)
    kl = max(float((meant.exp() * (meant - found.clamp(min=2 * _FLOOR))).sum()) for meant, found in pairs)
    most, most_kl = bounds
    parted = [_parted(reference, answer, i, most or 0.0) for i in range(len(pairs))]
    tokens = [meant == found for meant, found in zip(reference["tokens"], answer["tokens"], strict=True)]
    reasons = []
    if most is not None and not difference <= most:
        reasons.append(f"log-probabilities differ by {difference:.2g} nats (bound {most:g})")
    if most_kl is not None and not kl <= most_kl:
        reasons.append(f"KL {kl:.2g} nats (bound {most_kl:g})")
    if most is not None and any(parted):
        reasons.append(f"other greedy tokens after {sum(parted)} of {len(parted)} prompts")
    if not all(tokens):
        reasons.append(f"its tokenizer gives other tokens for {tokens.count(False)} of {len(tokens)} texts")
    return dataclasses.replace(
        measured(row, answer),
        verdict="different" if reasons else "same",
        reason="; ".join(reasons),
        difference=difference,
        kl=kl,
        greedy=f"{len(parted) - sum(parted)}/{len(parted)}",
        tokens=f"{sum(tokens)}/{len(tokens)}",
    )


def measured(row: Row, answer: dict[str, Any]) -> Row:
    """Speed and memory alone."""
    return dataclasses.replace(row, version=answer["version"], speed=answer.get("speed", {}), peak_bytes=answer["peak_bytes"])


def guessed(row: Row, alone: dict[str, Any], answer: dict[str, Any]) -> Row:
    """A model with another that guesses its tokens: what it takes of them, and whether it writes what it writes alone."""
    share, a_pass = taken(answer["written"])
    same = [one == other for one, other in zip(alone["greedy"], answer["greedy"], strict=True)]
    return dataclasses.replace(
        measured(row, answer), greedy=f"{sum(same)}/{len(same)}", reason=f"{share:.0%} of the guesses taken, {a_pass:.2f} tokens a pass"
    )


def taken(written: dict[str, Any]) -> tuple[float, float]:
    """Of a draft model's guesses: the share that was taken, and the tokens that a pass over them gives, with the one of its own."""
    accepted = written["accepted"]
    return accepted / max(written["guessed"], 1), 1 + accepted / max(written["passes"], 1)


def refused(row: Row, reason: str) -> Row:
    """An engine that did not serve the model, and its own words."""
    return dataclasses.replace(row, verdict="not served", reason=reason)


def table(rows: Sequence[Row]) -> str:
    """For people."""
    header = ["engine", "model", "weights", "max diff", "KL", "greedy", "tokens", "prompt tok/s", "decode tok/s", "peak MB", "verdict"]
    cells = [
        [
            row.version or row.engine,
            row.model,
            row.weights,
            *("-" if value is None else f"{value:.1e}" for value in (row.difference, row.kl)),
            row.greedy or "-",
            row.tokens or "-",
            *(f"{row.speed[name]:.0f}" if name in row.speed else "-" for name in ("prompt", "decode")),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
            f"{row.verdict}: {row.reason}" if row.reason else row.verdict,
        ]
        for row in rows
    ]
    return render(header, cells)


def _tensor(row: list[float]) -> torch.Tensor:
    return torch.tensor(row, dtype=torch.float64)


def _difference(meant: torch.Tensor, found: torch.Tensor) -> float:
    return float((meant.clamp(min=_FLOOR) - found.clamp(min=_FLOOR)).abs().max())


def _parted(reference: dict[str, Any], answer: dict[str, Any], index: int, tie: float) -> bool:
    """Whether the continuation of a prompt is another one, and not for a tie."""
    meant, found = reference["greedy"][index], answer["greedy"][index]
    at = next((i for i, (a, b) in enumerate(zip(meant, found, strict=False)) if a != b), None)
    if at is None and 0 < len(found) < len(meant):  # an engine may end where the text does
        return not (answer.get("ended", [False] * (index + 1))[index] and meant[len(found) - 1] in reference["special"])
    if at is None:
        return len(meant) != len(found)
    return reference["margins"][index][at] > tie
