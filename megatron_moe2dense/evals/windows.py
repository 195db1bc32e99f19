"""The token windows of an evaluation: of the perplexity, the KL and the prompts of the generation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals.config import EvalConfig
from megatron_moe2dense.evals.models import max_positions, vocab_size
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits
from megatron_moe2dense.tokens.indexed import windows as cut


@dataclass(frozen=True)
class Windows:
    """Token windows, int64 [N, S], None where not asked for: of the perplexity, of the KL where it has its own, and the prompts
    of the generation."""

    nll_NS: np.ndarray | None
    kl_NS: np.ndarray | None
    prompts_NS: np.ndarray | None


def cut_all(config: EvalConfig, indices: dict[str, CheckpointIndex]) -> Windows:
    """All windows that are needed, their tokens checked against every model's vocabulary."""
    positions = [found for index in indices.values() if (found := max_positions(index))]
    smallest = Limits(min(vocab_size(index) for index in indices.values()), min(positions, default=0))
    generation = config.generation

    def read(data: TokensConfig | None, stride: int | None = None) -> np.ndarray | None:
        return None if data is None else cut(data, smallest, stride)

    prompts = None
    if generation is not None:
        source = generation.data or (config.perplexity.data if config.perplexity else None)
        assert source is not None, "the config asks for one"
        prompts = source.model_copy(update={"sequence_length": generation.prompt_tokens, "sequences": max(generation.batch)})
    return Windows(
        read(config.perplexity.data, config.perplexity.stride) if config.perplexity else None,
        read(config.kl.data if config.kl else None),
        _filled(prompts, read(prompts)),
    )


def _filled(config: TokensConfig | None, prompts_NS: np.ndarray | None) -> np.ndarray | None:
    """The prompts; UserError when the tokens give fewer than the largest batch."""
    if config is not None and prompts_NS is not None and config.sequences is not None and len(prompts_NS) < config.sequences:
        raise UserError(
            f"{config.path}: {len(prompts_NS)} prompts of {config.sequence_length} tokens",
            f"{config.sequences}, the largest batch of `generation`",
            "use more text, shorter prompts or smaller batches",
        )
    return prompts_NS
