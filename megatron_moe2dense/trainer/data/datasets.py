"""Token files as Megatron-Core datasets: one GPTDataset for each file, a BlendedDataset over several.

Sample n depends on the files, weights, sequence length and seed, not on how many samples a run reads: the blend takes the source that is
furthest behind its weight, and each pass over a source is shuffled as a whole, the next one anew.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers_cpp import build_blending_indices
from megatron.core.datasets.utils import normalize
from torch.utils.data import Dataset

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.tokens.indexed import TokenFile, require_vocabulary
from megatron_moe2dense.trainer.data.config import StreamConfig, TrainDataConfig

# How many tokens, or document ends, of a file are looked at before training, to notice another tokenizer.
_SAMPLED_TOKENS, _SAMPLED_DOCUMENTS = 4_000_000, 10_000
# An id that no token has.
_NO_TOKEN = -2
_ORDER = "one pass after the other"


@dataclass(frozen=True)
class Reading:
    """How token files become samples.

    Attributes:
        data: sources, sequence length, passes. seed: of the order. vocab_size: of the model. index: folder for Megatron's index files.
        end_of_document: token after which a prediction does not count, None to count them all. pad: padding token in the files.
    """

    data: StreamConfig
    seed: int
    vocab_size: int
    index: Path
    end_of_document: int | None = None
    pad: int | None = None

    @classmethod
    def masked(cls, data: TrainDataConfig, model: Mapping[str, Any], vocab_size: int, seed: int, index: Path) -> Reading:
        """With the masks that `data` asks for; `model` is the student's config.json.

        Raises:
            UserError: no single end-of-document token, or a padding token that is none of the vocabulary.
        """
        end = _end_of_document(data, model) if data.mask_end_of_document else None
        if data.pad_token is not None and (data.pad_token == end or not 0 <= data.pad_token < vocab_size):
            raise UserError(
                f"data.pad_token={data.pad_token}" + (", the end-of-document token" if data.pad_token == end else ""),
                f"another token below the vocabulary of {vocab_size}",
                "set data.pad_token to the id that fills up the token files, or null",
            )
        return cls(data, seed, vocab_size, index, end, data.pad_token)


def _end_of_document(data: TrainDataConfig, model: Mapping[str, Any]) -> int:
    named = data.end_of_document if data.end_of_document is not None else model.get("eos_token_id")
    if not isinstance(named, int):
        raise UserError(
            f"eos_token_id={named} in the student's config.json", "one token", "set data.end_of_document to the id in the files"
        )
    return named


class Passes(Dataset):
    """Passes over one token file, one after the other: none begins before the last has read everything. Of a last part of a pass, the
    samples are random ones. (Megatron-Core itself shuffles the samples of all passes as one pool.)

    Attributes:
        datasets: one a pass, of the same length.
    """

    def __init__(self, datasets: list[GPTDataset]):
        self.datasets = datasets
        # what BlendedDataset asks for
        self.config, self.index_split = datasets[0].config, datasets[0].index_split
        self.unique_identifiers = {"class": "Passes", "passes": [dataset.unique_identifiers for dataset in datasets]}

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, number: int) -> Any:
        which, place = divmod(int(number), len(self.datasets[0]))
        return self.datasets[which][place]


def training_dataset(reading: Reading, needed: int | None) -> Passes | BlendedDataset:
    """The samples of `reading.data`, at least `needed` of them (None: one file, all it has).

    Raises:
        UserError: files missing or of another tokenizer; a source with fewer samples than its share.
    """
    require_samples(reading, needed)
    sources = reading.data.sources()
    weights = [source.weight for source in sources]
    datasets = [_passes(source.path, share, reading) for source, share in zip(sources, _shares(weights, needed), strict=True)]
    if len(datasets) == 1:
        return datasets[0]
    assert needed is not None, "a blend is as long as it is asked to be"
    weights = normalize(weights)
    blend = BlendedMegatronDatasetBuilder.build_generic_dataset(
        BlendedDataset, lambda: True, True, datasets, weights, needed, datasets[0].config
    )
    assert isinstance(blend, BlendedDataset)
    return blend


def require_samples(reading: Reading, needed: int | None) -> str:
    """What there is of the text of `reading.data`; errors as of `training_dataset`, without building one."""
    sources, tokens = reading.data.sources(), 0
    for source, share in zip(sources, _shares([source.weight for source in sources], needed), strict=True):
        file = require_file(source.path, reading)
        tokens += len(file.tokens)
        _require(source.path, samples_of(file, reading.data.sequence_length) * reading.data.epochs, share or 0, reading)
    return f"{tokens} tokens in {len(sources)} file{'s' * (len(sources) > 1)}"


def _shares(weights: list[float], needed: int | None) -> list[int] | list[None]:
    """How many of the first `needed` samples of a blend each source gives; None where all are asked for."""
    if needed is None:
        return [None] * len(weights)
    if len(weights) == 1:
        return [needed]
    drawn, number = np.zeros(needed, np.int16), np.zeros(needed, np.int64)
    build_blending_indices(drawn, number, np.asarray(normalize(weights)), len(weights), needed, False)
    return np.bincount(drawn, minlength=len(weights)).tolist()


def samples_of(file: TokenFile, length: int) -> int:
    """Samples of one pass: each has a token more than its length, which the next begins with."""
    return (len(file.tokens) - 1) // length


def _passes(path: str, needed: int | None, reading: Reading) -> Passes:
    """As many passes as hold `needed` samples, at least one; None: all that `data.epochs` allows."""
    first = one_pass(path, reading)
    count = reading.data.epochs if needed is None else max(1, -(-needed // len(first)))
    later = [one_pass(path, reading, number) for number in range(1, count)]
    assert all(len(each) == len(first) for each in later)
    return Passes([first, *later])


def _require(path: str, found: int, needed: int, reading: Reading) -> None:
    if found < needed:
        length, passes = reading.data.sequence_length, reading.data.epochs
        raise UserError(
            f"{path}: {found} samples of {length} tokens in {passes} pass(es)",
            f"{needed} samples, its share of the run",
            f"use more text, fewer steps, or say data.epochs={-(-needed * passes // max(found, 1))} if text may be repeated",
        )


def one_pass(prefix: str, reading: Reading, number: int = 0) -> GPTDataset:
    """A pass over one token file that `require_file` has looked at, in an order of its own by its number."""
    length = reading.data.sequence_length
    # GPTDataset asks its tokenizer for identity and special tokens alone. Padding is masked by SampleStream: Megatron would show the
    # model token 0 in its place, and count the prediction made at the last padding token.
    end = _NO_TOKEN if reading.end_of_document is None else reading.end_of_document
    identity = {"vocab_size": reading.vocab_size}
    tokenizer: Any = SimpleNamespace(unique_identifiers=identity, vocab_size=reading.vocab_size, eod=end, pad=-1)
    settings = GPTDatasetConfig(
        random_seed=_seed_of(reading.seed, number),
        sequence_length=length,
        blend_per_split=[([prefix], None), None, None],
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=reading.end_of_document is not None,
        create_attention_mask=False,
        path_to_cache=str(reading.index),
        mid_level_dataset_surplus=0.0,
    )
    sizes: Any = [None, None, None]  # None: one pass over the text
    dataset, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()
    assert isinstance(dataset, GPTDataset)
    return dataset


def _seed_of(seed: int, number: int) -> int:
    """Of a pass; the first has the run's own."""
    return seed if number == 0 else int.from_bytes(hashlib.sha256(f"{seed} pass {number}".encode()).digest()[:4], "little")


def require_file(prefix: str, reading: Reading) -> TokenFile:
    """UserError for files missing, damaged, shorter than a sample, of another tokenizer, or without end-of-document tokens to mask."""
    file, length = TokenFile.open(prefix), reading.data.sequence_length
    if len(file.tokens) <= length:
        raise UserError(f"{prefix}: {len(file.tokens)} tokens", f"more than one sample of {length}", "use more text or shorter sequences")
    looked_at = file.tokens[:: max(1, len(file.tokens) // _SAMPLED_TOKENS)]
    require_vocabulary(prefix, int(looked_at.min()), int(looked_at.max()), reading.vocab_size)
    if reading.end_of_document is not None:
        _require_ends(file, reading.end_of_document)
    return file


def _require_ends(file: TokenFile, end: int) -> None:
    """UserError when the documents end with other tokens: the mask would have no effect."""
    last = file.document_ends[file.document_ends > 0] - 1
    found = Counter(file.tokens[last[:: max(1, len(last) // _SAMPLED_DOCUMENTS)]].tolist())
    if end not in found:
        common = ", ".join(f"{token} ({count} times)" for token, count in found.most_common(3))
        raise UserError(
            f"{file.prefix}: no document ends with token {end}, but with {common}",
            "documents that end with the end-of-document token",
            "set data.end_of_document to the token they end with, or mask_end_of_document to false",
        )


def identity(data: StreamConfig, seed: int) -> dict[str, Any]:
    """What decides which tokens sample n has: content of the sources and their shares, sequence length, passes, seed; not their paths."""
    sources = data.sources()
    weights = normalize([source.weight for source in sources])
    # several passes were once one pool, which such a record does not say
    order = {"order": _ORDER} if data.epochs > 1 else {}
    return {
        **order,
        "sources": [
            {"fingerprint": TokenFile.open(source.path).fingerprint(), "weight": round(weight, 12)}
            for source, weight in zip(sources, weights, strict=True)
        ],
        "sequence_length": data.sequence_length,
        "epochs": data.epochs,
        "seed": seed,
    }


def texts(data: TrainDataConfig, seed: int) -> dict[str, Any]:
    """What the manifest of a run records of its token files."""
    validation = TokenFile.open(data.validation).fingerprint() if data.validation is not None else None
    return {"training": identity(data, seed), "validation": validation}
