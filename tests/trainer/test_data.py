"""Which sample a step reads, from one file or several: the same numbers at any layout, batch size and run length; what is masked."""

from __future__ import annotations

import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.data.datasets import Reading, identity
from megatron_moe2dense.trainer.data.samples import Batch, Samples, SampleStream, training_stream
from megatron_moe2dense.trainer.groups import Groups
from tests.helpers.tiny_models import write_tokens
from tests.trainer.streams import CPU, LENGTH, blend, config, documents, samples

pytestmark = pytest.mark.slow

END, PAD = 7, 3


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with runtime.session("cpu"), process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups


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
    with pytest.raises(UserError, match=r"24 samples of 8 tokens in 1 pass.*\n.*28 samples.*\n.*data.epochs=2"):
        training_stream(config(tmp_path, 7), groups, CPU, 500)
    assert len(training_stream(config(tmp_path, 7, epochs=2), groups, CPU, 500)) == 48


@pytest.mark.parametrize("kind", ["path", "blend", "two passes"])
def test_sample_numbers_do_not_depend_on_batch_size_ranks_or_length_of_the_run(kind: str, tmp_path: Path, groups: Groups):
    data = {"path": {}, "blend": {"blend": blend(tmp_path)}, "two passes": {"blend": blend(tmp_path), "epochs": 2}}[kind]
    expected = samples(training_stream(config(tmp_path, 24, 1, **data), groups, CPU, 4000), 24, 1)
    assert samples(training_stream(config(tmp_path, 3, 8, **data), groups, CPU, 4000), 3, 8) == expected
    for ranks, micro, size in ((1, 2, 4), (2, 1, 4), (2, 2, 12), (4, 2, 8)):
        source = training_stream(config(tmp_path, 24 // size, size, **data), groups, CPU, 4000)
        found: dict[int, tuple[int, ...]] = {}
        for rank in range(ranks):
            layout: Any = SimpleNamespace(data_rank=rank, data_size=ranks)
            stream = SampleStream(source._samples, layout, micro, CPU)
            for step in range(24 // size):
                for batch in stream.micro_batches(step * size, size):
                    assert all(step * size <= number < (step + 1) * size for number in batch.samples)
                    found |= dict(zip(batch.samples, map(tuple, batch.tokens.tolist()), strict=True))
        assert [found[number] for number in range(24)] == expected


def test_a_blend_keeps_its_weights_and_repeats_nothing(tmp_path: Path, groups: Groups):
    drawn = samples(training_stream(config(tmp_path, 15, blend=blend(tmp_path)), groups, CPU, 4000), 15, 4)
    assert len(set(drawn)) == 60
    counts = Counter(row[0] // 1000 for row in drawn)
    assert [counts[i] for i in range(3)] == pytest.approx([36, 18, 6], abs=1)
    first = Counter(row[0] // 1000 for row in drawn[:20])
    assert [first[i] for i in range(3)] == pytest.approx([12, 6, 2], abs=1)


def test_a_source_too_small_for_its_share_is_refused_by_name(tmp_path: Path, groups: Groups):
    sources = blend(tmp_path)
    sources[2]["weight"] = 0.5
    with pytest.raises(UserError, match=r"source2: 10 samples of 8 tokens in 1 pass.*\n.*2[0-2] samples, its share.*\n.*data.epochs=3"):
        training_stream(config(tmp_path, 15, blend=sources), groups, CPU, 4000)
    drawn = samples(training_stream(config(tmp_path, 15, blend=sources, epochs=3), groups, CPU, 4000), 15, 4)
    assert Counter(row[0] // 1000 for row in drawn)[2] == pytest.approx(60 * 0.5 / 1.4, abs=1)


def test_another_seed_is_another_order(tmp_path: Path, groups: Groups):
    settings = config(tmp_path)
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 1})})
    found, expected = (samples(training_stream(item, groups, CPU, 500), 6, 4) for item in (other, settings))
    assert found != expected
    assert set(found) == set(expected)


def masked_places(batches: list[Batch]) -> dict[tuple[int, int], float]:
    """mask by (input token, label)."""
    return {
        (int(token), int(label)): float(mask)
        for batch in batches
        for token, label, mask in zip(batch.tokens.flatten(), batch.labels.flatten(), batch.mask.flatten(), strict=True)
    }


@pytest.mark.parametrize("named", ["in the data block", "by the student"])
def test_only_the_prediction_made_at_an_end_of_document_is_left_out(named: str, tmp_path: Path, groups: Groups):
    path = documents(tmp_path, [10, 11, 12, END], [20, 21, END], [30, 31, 32, 33, 34, 35, 36, 37, 38, END])
    write_json(tmp_path / "config.json", {"eos_token_id": END if named == "by the student" else [1, 2]})
    options: dict[str, Any] = {"mask_end_of_document": True} | ({"end_of_document": END} if named != "by the student" else {})
    batches = training_stream(config(tmp_path, 2, 1, path=path, **options), groups, CPU, 500).micro_batches(0, 2)
    places = masked_places(batches)
    assert {place for place, mask in places.items() if mask == 0} == {place for place in places if place[0] == END}
    assert any(label == END and mask == 1 for (_, label), mask in places.items())
    unmasked = training_stream(config(tmp_path, 2, 1, path=path), groups, CPU, 500).micro_batches(0, 2)
    assert all(batch.mask.all() for batch in unmasked)


def test_predictions_of_padding_and_at_padding_are_left_out_and_tokens_stay(tmp_path: Path, groups: Groups):
    path = documents(tmp_path, [10, 11, 12, PAD, PAD, PAD, 20, 21, PAD, 30, 31, 32, 33, 34, 35, 36, 37])
    write_json(tmp_path / "config.json", {})
    batches = training_stream(config(tmp_path, 2, 1, path=path, pad_token=PAD), groups, CPU, 500).micro_batches(0, 2)
    places = masked_places(batches)
    assert {place for place, mask in places.items() if mask == 0} == {(12, PAD), (PAD, PAD), (PAD, 20), (21, PAD), (PAD, 30)}
    assert sorted(token for batch in batches for token in batch.tokens.flatten().tolist()).count(PAD) == 4


def test_settings_of_masks_without_effect_are_refused(tmp_path: Path, groups: Groups):
    path = documents(tmp_path, [10, 11, 12, END], [*range(20, 40), END])
    write_json(tmp_path / "config.json", {"eos_token_id": [1, 2]})

    def refused(message: str, **data: Any) -> None:
        with pytest.raises(UserError, match=message):
            training_stream(config(tmp_path, 2, 1, path=path, **data), groups, CPU, 500)

    refused("end_of_document has no effect", end_of_document=END)
    refused("would never be trained", mask_end_of_document=True, end_of_document=END, pad_token=END)
    refused(r"eos_token_id=\[1, 2\]", mask_end_of_document=True)
    refused(r"no document ends with token 5, but with 7 \(2 times\)", mask_end_of_document=True, end_of_document=5)
    refused("another token below the vocabulary of 500", pad_token=500)


BROKEN = {
    "no index": (lambda prefix: Path(prefix + ".idx").unlink(), "no file .*idx"),
    "no tokens": (lambda prefix: Path(prefix + ".bin").unlink(), "no file .*bin"),
    "a cut index": (lambda prefix: Path(prefix + ".idx").write_bytes(Path(prefix + ".idx").read_bytes()[:40]), "40 bytes"),
    "cut tokens": (lambda prefix: Path(prefix + ".bin").write_bytes(Path(prefix + ".bin").read_bytes()[:-2]), "by its .idx"),
    "a foreign index": (lambda prefix: Path(prefix + ".idx").write_bytes(b"x" * 90), "is no Megatron index"),
    "a token above the vocabulary": (lambda prefix: write_tokens(prefix, np.arange(300) + 3900, 4200), "token 4199"),
    "too short": (lambda prefix: write_tokens(prefix, np.arange(LENGTH), 4000), "more than one sample"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_anywhere_in_a_blend_is_refused(name: str, tmp_path: Path, groups: Groups):
    sources = blend(tmp_path)
    break_it, message = BROKEN[name]
    break_it(sources[1]["path"])
    with pytest.raises(UserError, match=message):
        training_stream(config(tmp_path, 2, blend=sources), groups, CPU, 4000)


def test_a_rare_token_outside_the_vocabulary_is_refused_when_it_is_read(tmp_path: Path):
    reading = Reading(config(tmp_path).data, 0, 500, tmp_path)
    rows = torch.arange(LENGTH)
    for tokens, labels in ((rows, rows + 493), (rows - 1, rows)):
        dataset: Any = [{"tokens": tokens, "labels": labels, "loss_mask": torch.ones(LENGTH), "position_ids": rows}]
        with pytest.raises(UserError, match=r"token (500|-1)"):
            Samples(dataset, reading).batch([0], CPU)


def test_the_identity_tells_order_and_content_apart_and_not_the_place(tmp_path: Path):
    def of(seed: int = 0, **data: Any) -> dict[str, Any]:
        return identity(config(tmp_path, **data).data, seed)

    sources = blend(tmp_path)
    first = of(blend=sources)
    moved = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name} moved"))
    assert of(blend=[{"path": str(moved / Path(item["path"]).name), "weight": 10 * item["weight"]} for item in sources]) == first
    assert of(seed=1, blend=sources) != first
    assert of(epochs=2, blend=sources) != first
    assert of(blend=[{**sources[0], "weight": 0.5}, *sources[1:]]) != first
    data = Path(sources[0]["path"] + ".bin")
    raw = bytearray(data.read_bytes())
    raw[100:104] = struct.pack("<HH", 9, 9)
    data.write_bytes(raw)
    assert of(blend=sources) != first
