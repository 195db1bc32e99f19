"""Which rank is said to hold up a job, from what the ranks say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_moe2dense.trainer.watchdog import Heartbeat, late

WAITING = Heartbeat("a", 10, count=7, step=41, at="trainer/step.py:110 _reduce")


def heartbeats(ranks: int, **other: Heartbeat) -> list[Heartbeat]:
    return [other.get(f"rank{rank}", replace(WAITING, process=10 + rank)) for rank in range(ranks)]


def later(before: list[Heartbeat]) -> list[Heartbeat]:
    return [replace(heartbeat, count=heartbeat.count + 3) for heartbeat in before]


def test_a_rank_without_a_beat_has_stopped_whatever_its_step():
    before = heartbeats(4, rank2=Heartbeat("b", 77, 5, 42, "trainer/optim.py:90 update"))
    after = later(before)
    after[2] = before[2]
    assert (
        "no answer from rank 2 (process 77 on b, last heard of after step 42 in trainer/optim.py:90 update)"
        in late(before, after, 60.0).found
    )


def test_of_ranks_that_all_run_those_behind_are_named():
    before = heartbeats(4, rank1=Heartbeat("b", 77, 5, 40, "trainer/data/samples.py:50 read"))
    found = late(before, later(before), 60.0).found
    assert "behind the others: rank 1 (process 77 on b, last heard of after step 40 in trainer/data/samples.py:50 read)" in found
    assert "rank 0" not in found


def test_of_ranks_at_one_step_those_where_few_are_are_named():
    before = heartbeats(4, rank3=Heartbeat("b", 77, 5, 41, "trainer/data/samples.py:50 read"))
    found = late(before, later(before), 60.0).found
    assert "first to look at: rank 3 (process 77 on b" in found
    assert "rank 0" not in found


@pytest.mark.parametrize(("ranks", "more"), [(8, False), (512, True)])
def test_a_message_names_no_more_than_eight_ranks(ranks: int, more: bool):
    found = late(heartbeats(ranks), heartbeats(ranks), 60.0).found
    assert found.count("process") == 8
    assert (f"{ranks - 8} more" in found) == more
