"""Which sample a step reads: every token once, the same samples at any layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from megatron_moe2dense.trainer.data import SampleStream, training_stream
from megatron_moe2dense.trainer.groups import Groups
from tests.helpers.tiny_models import write_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with runtime.session("cpu"), process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups


def config(tmp_path: Path, **data: Any) -> DistillConfig:
    prefix = write_tokens(tmp_path / "tokens", np.arange(24 * 8 + 1), vocab=500)
    settings = {
        "student": "-",
        "teacher": None,
        "output": str(tmp_path / "run"),
        "data": {"path": prefix, "sequence_length": 8, **data},
        "batch": {"micro": 1, "global": 4},
        "train": {"steps": 6},
    }
    return build(DistillConfig, settings, "the test")


def test_one_pass_reads_every_token_once_shuffled(tmp_path: Path, groups: Groups):
    stream = training_stream(config(tmp_path), groups, CPU, 500)
    batches = [batch for step in range(6) for batch in stream.micro_batches(step * 4, 4)]
    firsts = [int(batch.tokens[0, 0]) for batch in batches]
    assert sorted(firsts) == list(range(0, 192, 8))
    assert firsts != sorted(firsts)
    for batch in batches:
        assert torch.equal(batch.labels, batch.tokens + 1)
        assert batch.mask.all()


def test_a_second_pass_must_be_asked_for(tmp_path: Path, groups: Groups):
    assert len(training_stream(config(tmp_path), groups, CPU, 500)) == 24
    assert len(training_stream(config(tmp_path, epochs=2), groups, CPU, 500)) >= 48


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_the_samples_of_a_step_do_not_depend_on_the_layout(ranks: int, micro: int):
    dataset: Any = [{name: torch.tensor([i]) for name in ("tokens", "labels", "loss_mask", "position_ids")} for i in range(12)]
    seen = []
    for rank in range(ranks):
        layout: Any = SimpleNamespace(data_rank=rank, data_size=ranks)
        for batch in SampleStream(dataset, layout, micro, CPU).micro_batches(4, 4):
            assert len(batch.tokens) == micro
            seen += batch.tokens.flatten().tolist()
    assert sorted(seen) == [4, 5, 6, 7]
