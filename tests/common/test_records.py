from __future__ import annotations

import errno
import os
import resource
import threading

import pytest

from megatron_moe2dense.common import records
from megatron_moe2dense.common.errors import UserError


def test_rows_come_back_as_they_were_appended(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    rows = [{"step": 1, "loss": 0.1}, {"name": "é\n\u2028", "nested": {"a": [1, None]}}]
    for row in rows:
        records.append(path, row)
    assert records.read(path) == rows


def test_a_last_line_cut_off_by_a_killed_writer_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append(path, {"step": 1})
    whole = path.read_bytes()
    records.append(path, {"step": 2})
    for size in range(len(whole), path.stat().st_size):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(path.read_bytes()[:size])
        assert records.read(cut) == [{"step": 1}]


def test_appending_after_a_cut_off_line_loses_no_row(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    records.append(path, {"step": 2})
    assert records.read(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_a_user_error_with_its_number(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        records.read(path)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        records.read(tmp_path / "absent.jsonl")


def test_rewriting_replaces_all_rows(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append(path, {"a": 1})
    records.rewrite(path, [{"a": 2}, {"a": 3}])
    assert records.read(path) == [{"a": 2}, {"a": 3}]
    assert [item.name for item in tmp_path.iterdir()] == ["records.jsonl"]


def test_rows_of_several_writers_never_interleave(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [{"writer": writer, "text": "x" * 20_000} for writer in range(8)]
    threads = [threading.Thread(target=records.append, args=(path, row)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["writer"] for row in records.read(path)) == list(range(8))


def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        records.append(tmp_path / "records.jsonl", {"a": 1})


def test_a_row_that_only_fits_in_part_is_an_error_and_goes_with_the_next(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append(path, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            records.append(path, {"b": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.read_bytes().endswith(b"\n")  # the disk took ten bytes of the row
    assert records.read(path) == [{"a": 1}]
    records.append(path, {"c": 3})
    assert records.read(path) == [{"a": 1}, {"c": 3}]
