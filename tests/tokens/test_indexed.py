from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, TokenFile, TokenFileWriter, windows, write_token_file

DOCUMENTS = [np.array([5, 6, 7]), np.array([1]), np.arange(200)]


def megatron_writes(prefix: str, documents: list[np.ndarray], vocab_size: int) -> None:
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.as_tensor(document), [len(document)])
    builder.finalize(prefix + ".idx")


def window_config(prefix: str, **options) -> TokensConfig:
    return TokensConfig(path=prefix, **options)


@pytest.mark.parametrize("vocab_size", [2048, 65_499, 65_500, 151_936])
def test_files_are_byte_identical_to_megatrons(tmp_path, vocab_size):
    documents = [*DOCUMENTS, np.array([vocab_size - 1])]
    megatron_writes(str(tmp_path / "theirs"), documents, vocab_size)
    write_token_file(str(tmp_path / "ours"), documents, vocab_size)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_megatron_reads_back_the_documents(tmp_path_factory, lengths, seed):
    prefix = str(tmp_path_factory.mktemp("tokens") / "a")
    generator = np.random.default_rng(seed)
    documents = [generator.integers(0, 2048, length) for length in lengths]
    assert write_token_file(prefix, documents, 2048) == (len(lengths), sum(lengths))
    dataset = IndexedDataset(prefix)
    assert len(dataset) == len(documents)
    assert all(np.array_equal(dataset[index], document) for index, document in enumerate(documents))
    assert list(dataset.document_indices) == list(range(len(documents) + 1))


def test_what_megatron_wrote_is_opened(tmp_path):
    prefix = str(tmp_path / "theirs")
    megatron_writes(prefix, DOCUMENTS, 2048)
    opened = TokenFile.open(prefix)
    assert np.array_equal(opened.tokens, np.concatenate(DOCUMENTS))
    assert list(opened.document_ends) == [3, 4, 204]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_of_the_pair_is_a_user_error(tmp_path, suffix):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(UserError, match=f"no file .*{suffix}"):
        TokenFile.open(prefix)


def test_every_truncation_of_the_pair_is_a_user_error(tmp_path):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    for suffix in (".bin", ".idx"):
        path = tmp_path / f"a{suffix}"
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError):
                TokenFile.open(prefix)
        path.write_bytes(whole)
    assert len(TokenFile.open(prefix).tokens) == 204


def test_a_file_of_another_kind_is_a_user_error(tmp_path):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    (tmp_path / "a.idx").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(UserError, match="no Megatron index"):
        TokenFile.open(prefix)


@pytest.mark.parametrize(("offset", "value"), [(9, 7), (17, 99)])
def test_another_version_or_token_type_is_a_user_error(tmp_path, offset, value):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[offset] = value
    (tmp_path / "a.idx").write_bytes(raw)
    with pytest.raises(UserError):
        TokenFile.open(prefix)


def test_document_borders_outside_the_index_are_a_user_error(tmp_path):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[-8:] = (99).to_bytes(8, "little")
    (tmp_path / "a.idx").write_bytes(raw)
    with pytest.raises(UserError):
        TokenFile.open(prefix)


def test_a_failing_source_leaves_nothing(tmp_path):
    def broken():
        yield np.arange(3)
        raise UserError("a", "b", "c")

    with pytest.raises(UserError):
        write_token_file(str(tmp_path / "a"), broken(), 2048)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_user_error_and_the_old_pair_stays(tmp_path, monkeypatch):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    before = (tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()
    writer = TokenFileWriter(prefix, 2048)

    class Full:
        def write(self, _data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer._file.close()
    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(UserError, match="No space left"):
        writer.add(np.arange(3))
    writer.discard()
    assert ((tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()) == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_windows_are_the_stream_cut_without_overlap_or_gap(tmp_path):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    stream = np.concatenate(DOCUMENTS)
    cut = windows(window_config(prefix, sequence_length=10, sequences=None), Limits(2048))
    assert cut.shape == (20, 10)
    assert cut.dtype == np.int64
    assert np.array_equal(cut.reshape(-1), stream[:200])


def test_the_dropped_tail_is_said(tmp_path, caplog):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, DOCUMENTS, 2048)
    with caplog.at_level("INFO", "megatron_moe2dense"):
        windows(window_config(prefix, sequence_length=10, sequences=None), Limits(2048))
        assert "the last 4 tokens" in caplog.text
        windows(window_config(prefix, sequence_length=10, sequences=50), Limits(2048))
        assert "20 windows of 10 tokens, fewer than the 50 asked for" in caplog.text


def test_chosen_windows_depend_on_the_seed_alone_and_keep_their_order(tmp_path):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, [np.arange(2000)], 2048)

    def chosen(seed: int) -> list[int]:
        return list(windows(window_config(prefix, sequence_length=10, sequences=20, seed=seed), Limits(2048))[:, 0] // 10)

    assert chosen(1) == chosen(1) == sorted(set(chosen(1)))
    assert len(chosen(1)) == 20
    assert chosen(1) != chosen(2)


def test_a_token_outside_the_vocabulary_is_a_user_error(tmp_path):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, [np.arange(100)], 2048)
    windows(window_config(prefix, sequence_length=10), Limits(100))
    with pytest.raises(UserError, match=r"(?s)token 99.*vocabulary of 99"):
        windows(window_config(prefix, sequence_length=10), Limits(99))


@pytest.mark.parametrize("documents", [[np.arange(9)], []])
def test_less_than_one_window_is_a_user_error(tmp_path, documents):
    prefix = str(tmp_path / "a")
    write_token_file(prefix, documents, 2048)
    with pytest.raises(UserError, match="at least sequence_length=10"):
        windows(window_config(prefix, sequence_length=10), Limits(2048))
