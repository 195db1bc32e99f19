"""Training samples through Megatron-Core's GPTDataset: which sample a step reads depends on seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.groups import Groups

# How many tokens of a file are looked at before training, to notice another tokenizer.
_SAMPLED_TOKENS = 4_000_000


@dataclass(frozen=True)
class Batch:
    """One micro-batch, [B, S] each; mask is 1.0 where the prediction counts. `flat` gives sequence-major [S*B] views."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor

    def flat(self) -> tuple[Tensor, Tensor]:
        """labels and mask as [T], in the order of hidden states [S, B, D] flattened."""
        return self.labels.t().reshape(-1), self.mask.t().reshape(-1)


class SampleStream:
    """Samples by number, put together into this rank's micro-batches.

    Micro-batch m of data rank r at a step holds the samples `step * global + (m * data_size + r) * micro + i`, so the set of samples
    of a step does not depend on the layout.
    """

    def __init__(self, dataset: GPTDataset, groups: Groups, micro: int, device: torch.device):
        self._dataset, self._groups, self._micro, self.device = dataset, groups, micro, device

    def __len__(self) -> int:
        return len(self._dataset)

    def micro_batches(self, first_sample: int, count: int) -> list[Batch]:
        """This rank's micro-batches for `count` samples from `first_sample` on."""
        per_round = self._micro * self._groups.data_size
        assert count % per_round == 0
        starts = range(first_sample + self._groups.data_rank * self._micro, first_sample + count, per_round)
        return [self._batch([self._dataset[i] for i in range(start, start + self._micro)]) for start in starts]

    def _batch(self, samples: list[dict[str, Tensor]]) -> Batch:
        stacked = {name: torch.stack([sample[name] for sample in samples]).to(self.device) for name in samples[0]}
        return Batch(stacked["tokens"], stacked["labels"], stacked["loss_mask"], stacked["position_ids"])


def training_stream(config: DistillConfig, groups: Groups, device: torch.device, vocab_size: int) -> SampleStream:
    """The stream of `data.path`.

    Raises:
        UserError: files missing or of another tokenizer; fewer samples than the run needs.
    """
    data, needed = config.data, config.steps() * config.batch.global_
    samples = None if data.epochs == 1 else _samples(data.path, data.sequence_length) * data.epochs
    stream = SampleStream(_dataset(data.path, config, samples, vocab_size), groups, config.batch.micro, device)
    if len(stream) < needed:
        raise UserError(
            f"{data.path}: {len(stream)} samples of {data.sequence_length} tokens in {data.epochs} pass(es)",
            f"{needed} samples for {config.steps()} steps of {config.batch.global_}",
            "use more text, fewer steps, or say data.epochs=2 if text may be repeated",
        )
    return stream


def validation_stream(config: DistillConfig, groups: Groups, device: torch.device, vocab_size: int) -> SampleStream | None:
    """The stream of `data.validation`, None when there is none; UserError when it is too short."""
    if config.data.validation is None:
        return None
    stream = SampleStream(_dataset(config.data.validation, config, None, vocab_size), groups, config.batch.micro, device)
    wanted, per_round = config.data.validation_sequences, config.batch.micro * groups.data_size
    if len(stream) < wanted or wanted % per_round:
        raise UserError(
            f"{config.data.validation}: {len(stream)} sequences, data.validation_sequences={wanted}",
            f"a multiple of batch.micro x data-parallel ranks = {per_round}, at most {len(stream)}",
            "change data.validation_sequences or use more held-out text",
        )
    return stream


def _samples(prefix: str, sequence_length: int) -> int:
    return (len(TokenFile.open(prefix).tokens) - 1) // sequence_length


def _dataset(prefix: str, config: DistillConfig, samples: int | None, vocab_size: int) -> GPTDataset:
    tokens = TokenFile.open(prefix).tokens
    length = config.data.sequence_length
    if len(tokens) <= length:
        raise UserError(f"{prefix}: {len(tokens)} tokens", f"more than one sample of {length}", "use more text or shorter sequences")
    highest = int(tokens[:: max(1, len(tokens) // _SAMPLED_TOKENS)].max())
    if highest >= vocab_size:
        raise UserError(
            f"{prefix}: token {highest}",
            f"tokens below the model's vocabulary of {vocab_size}",
            "tokenise the text with the model's own tokenizer (`moe2dense data`)",
        )
    # GPTDataset only asks its tokenizer for identity and special tokens when it builds its index.
    tokenizer: Any = SimpleNamespace(unique_identifiers={"vocab_size": vocab_size}, vocab_size=vocab_size, eod=-1, pad=-1)
    settings = GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=length,
        blend_per_split=[([prefix], None), None, None],
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(Path(config.output) / "data_index"),
        mid_level_dataset_surplus=0.0,
    )
    sizes: Any = [samples, None, None]  # None: one pass over the text
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()
    assert isinstance(train, GPTDataset)
    return train
