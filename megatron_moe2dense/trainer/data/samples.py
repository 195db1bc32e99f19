"""The samples of a run by number, put together into each rank's micro-batches; the same samples in the same steps at any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor

from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import read_json
from megatron_moe2dense.tokens.indexed import require_vocabulary
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.datasets import (
    Passes,
    Reading,
    one_pass,
    require_file,
    samples_of,
    training_dataset,
)
from megatron_moe2dense.trainer.groups import Groups

# Of the draw of held-out sequences: runs are compared on the same ones, whatever their train.seed.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Batch:
    """One micro-batch, [B, S] each; mask is 1.0 where the prediction counts. `flat` gives sequence-major [S*B] views.

    samples: numbers of the B samples in their stream. positions: places of the S tokens in the sample.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor
    samples: tuple[int, ...]

    def flat(self) -> tuple[Tensor, Tensor]:
        """labels and mask as [T], in the order of hidden states [S, B, D] flattened."""
        return self.labels.t().reshape(-1), self.mask.t().reshape(-1)


@dataclass(frozen=True)
class Samples:
    """A dataset and how it was made."""

    dataset: GPTDataset | Passes | BlendedDataset
    reading: Reading

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, numbers: Sequence[int], device: torch.device) -> Batch:
        """The samples of these numbers; UserError for a token outside the vocabulary."""
        samples: list[Any] = [self.dataset[number] for number in numbers]
        tokens, labels, mask, positions = (
            torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask", "position_ids")
        )
        lowest, highest = (int(part) for part in torch.cat([tokens[:, :1], labels], 1).aminmax())
        require_vocabulary(f"sample among {list(numbers)}", lowest, highest, self.reading.vocab_size)
        if self.reading.pad is not None:
            mask = mask.masked_fill((tokens == self.reading.pad) | (labels == self.reading.pad), 0.0)
        return Batch(*(part.to(device) for part in (tokens, labels, mask, positions)), samples=tuple(numbers))


class SampleStream:
    """Samples by number, put together into this rank's micro-batches.

    Micro-batch m of data rank r at a step holds the samples `step * global + (m * data_size + r) * micro + i`, so the set of samples
    of a step does not depend on the layout.

    Args:
        samples: by number. groups: of this rank. micro: samples in a micro-batch. device: where batches go.
    """

    def __init__(self, samples: Samples, groups: Groups, micro: int, device: torch.device):
        self._samples, self._groups, self._micro, self.device = samples, groups, micro, device

    def __len__(self) -> int:
        return len(self._samples)

    def first(self) -> Batch:
        """Sample 0 alone, the same on every rank."""
        return self._samples.batch([0], self.device)

    def micro_batches(self, first_sample: int, count: int) -> list[Batch]:
        """This rank's micro-batches for `count` samples from `first_sample` on."""
        per_round = self._micro * self._groups.data_size
        assert count % per_round == 0
        starts = range(first_sample + self._groups.data_rank * self._micro, first_sample + count, per_round)
        return [self._samples.batch(range(start, start + self._micro), self.device) for start in starts]

    def filled_up(self, count: int) -> list[Batch]:
        """This rank's micro-batches for the first `count` samples, in whole rounds of all ranks and, interleaved, of the pipeline: what is
        missing is sample 0 again, with every prediction masked."""
        parallel = self._groups.parallel
        unit = self._micro * self._groups.data_size * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        rounds = range(self._groups.data_rank * self._micro, -(-count // unit) * unit, self._micro * self._groups.data_size)
        batches = []
        for start in rounds:
            numbers = range(start, start + self._micro)
            batch = self._samples.batch([number if number < count else 0 for number in numbers], self.device)
            kept_B = torch.tensor([number < count for number in numbers], device=self.device)
            batches.append(dataclasses.replace(batch, mask=batch.mask * kept_B[:, None]))
        return batches


def training_stream(config: DistillConfig, groups: Groups, device: torch.device, vocab_size: int) -> SampleStream:
    """The stream of `data.path` or `data.blend`.

    Raises:
        UserError: files missing or of another tokenizer; fewer samples than the run needs.
    """
    reading = reading_of(config, vocab_size)
    dataset = training_dataset(reading, config.steps() * config.batch.global_)
    return SampleStream(Samples(dataset, reading), groups, config.batch.micro, device)


def validation_stream(config: DistillConfig, groups: Groups, device: torch.device, vocab_size: int) -> SampleStream | None:
    """The stream of `data.validation`, None when there is none; UserError when it is too short."""
    if config.data.validation is None:
        return None
    require_validation(config, config.data.validation, vocab_size)
    reading = dataclasses.replace(reading_of(config, vocab_size), seed=VALIDATION_SEED)
    dataset = one_pass(config.data.validation, reading)
    return SampleStream(Samples(dataset, reading), groups, config.batch.micro, device)


def require_validation(config: DistillConfig, prefix: str, vocab_size: int) -> str:
    """What there is of the held-out text `prefix`; UserError when it is none or too short."""
    found = samples_of(require_file(prefix, reading_of(config, vocab_size)), config.data.sequence_length)
    wanted = config.data.validation_sequences
    if found < wanted:
        raise UserError(
            f"{prefix}: {found} sequences, data.validation_sequences={wanted}",
            f"at most {found}",
            "lower data.validation_sequences or use more held-out text",
        )
    return f"{wanted} of {found} sequences"


def reading_of(config: DistillConfig, vocab_size: int) -> Reading:
    """How the token files of a run become samples; UserError for masks that its text or its student's config.json has no tokens for."""
    index = Path(config.output) / "data_index"
    if not config.data.mask_end_of_document and config.data.pad_token is None:
        return Reading(config.data, config.train.seed, vocab_size, index)
    student = read_json(hub.located(config.student) / "config.json", "the student's Hugging Face directory with its config.json")
    return Reading.masked(config.data, student, vocab_size, config.train.seed, index)
