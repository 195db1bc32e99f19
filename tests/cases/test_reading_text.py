"""Which text a run reads, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.data.samples import SampleStream, training_stream, validation_stream
from megatron_moe2dense.trainer.groups import Groups
from tests.helpers.tiny_models import write_tokens
from tests.trainer.streams import CPU, LENGTH, config, documents, samples


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with runtime.session("cpu"), process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups


@pytest.mark.parametrize("blended", [False, True])
def test_text_is_repeated(blended: bool, tmp_path: Path, groups: Groups):
    """`data.epochs` above 1: every pass reads all of the text once, in an order of its own, and of a last part of a pass a random part."""
    texts = [list(range(start, start + 6)) for start in range(0, 24 * LENGTH, 6)]
    path = documents(tmp_path, *texts, [499])
    other = write_tokens(tmp_path / "other", np.arange(400 * LENGTH + 1) % 500 + 500, vocab=1000)
    data = {"blend": [{"path": path, "weight": 1.0}, {"path": other, "weight": 1.0}]} if blended else {"path": path}
    stream = training_stream(config(tmp_path, 60 * (2 if blended else 1), 1, epochs=3, **data), groups, CPU, 1000)
    rows = [row for row in samples(stream, 60 * (2 if blended else 1), 1) if row[0] < 500]
    assert len(rows) == 60
    passes = [rows[:24], rows[24:48], rows[48:]]
    tokens = [Counter(token for row in each for token in row) for each in passes]
    assert all(set(count.values()) == {1} for count in tokens)
    assert [len(count) for count in tokens[:2]] == [24 * LENGTH] * 2
    firsts = [[row[0] for row in each] for each in passes]
    assert firsts[0] != firsts[1]
    assert firsts[2] != firsts[0][:12]
    assert firsts[2] != firsts[1][:12]
    assert max(firsts[2]) - min(firsts[2]) > 12 * LENGTH  # from all over the text


def test_few_held_out_sequences_on_many_ranks(tmp_path: Path, groups: Groups):
    """`data.validation_sequences` that are no multiple of the ranks: every rank evaluates, and each sequence counts once."""
    settings = config(tmp_path, validation=write_tokens(tmp_path / "held-out", np.arange(20 * LENGTH + 1), 500), validation_sequences=5)
    source = validation_stream(settings, groups, CPU, 500)
    assert source is not None
    expected = {number: tuple(row) for number, row in enumerate(torch.cat([b.tokens for b in source.micro_batches(0, 5)]).tolist())}
    for ranks, micro, stages, batches in ((1, 1, 1, 5), (1, 2, 1, 3), (4, 1, 1, 2), (8, 1, 1, 1), (3, 2, 1, 1), (1, 1, 4, 8)):
        found: Counter[tuple[int, ...]] = Counter()
        for rank in range(ranks):
            parallel = ParallelConfig(pipeline=stages, virtual_pipeline=2 if stages > 1 else 1)
            layout: Any = SimpleNamespace(data_rank=rank, data_size=ranks, parallel=parallel)
            mine = SampleStream(source._samples, layout, micro, CPU).filled_up(5)
            assert len(mine) == batches
            found.update(tuple(row) for batch in mine for row, kept in zip(batch.tokens.tolist(), batch.mask.all(1), strict=True) if kept)
            assert all(float(row.sum()) in (0, LENGTH) for batch in mine for row in batch.mask)
        assert found == Counter(expected.values())


def test_runs_of_two_seeds_are_compared(tmp_path: Path, groups: Groups):
    """Runs of two train.seed: evaluations read the same held-out sequences."""
    held_out = {"validation": write_tokens(tmp_path / "held-out", np.arange(20 * LENGTH + 1), 500), "validation_sequences": 5}
    settings = config(tmp_path, **held_out)
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 1})})
    found = []
    for item in (settings, other):
        stream = validation_stream(item, groups, CPU, 500)
        assert stream is not None
        found.append(samples(stream, 5, 1))
    assert found[0] == found[1]
