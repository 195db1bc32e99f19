"""Ranks and whole agents of a job on two nodes are killed, one after the other (`make chaos`): each time all start again from the last
checkpoint, and the run ends as one process that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe2dense import cli
from tests.launch import jobs

pytestmark = pytest.mark.distributed


def test_a_job_that_loses_ranks_and_agents_ends_like_one_process(tmp_path: Path):
    victims = ("agent 0", "rank 1", "agent 1")
    config, run = jobs.write_inputs(tmp_path, teacher=True), tmp_path / "run"
    with jobs.started(jobs.submit(2, config, f"output={run}"), tmp_path, RESTARTS=str(len(victims))) as job:
        for victim in victims:
            # one that is killed right after a start would only show that nothing was done yet
            goal = jobs.last_step(run) + 12
            jobs.wait_until(job, lambda goal=goal: jobs.last_step(run) >= goal)
            kind, number = victim.split()
            (jobs.agents if kind == "agent" else jobs.ranks)(job)[int(number)].kill()
        assert job.wait(timeout=400) == 0, jobs.said(tmp_path)
    assert not (tmp_path / "spool/requeued").exists()
    killed = sum(victim.startswith("agent") for victim in victims)
    assert jobs.said(tmp_path).count("torchrun was killed") == killed
    cli.main(["distill", str(config), f"output={tmp_path / 'straight'}"])
    jobs.assert_same_run(run, tmp_path / "straight")


def test_a_refused_run_starts_no_rank_again(tmp_path: Path):
    """The batch does not divide by the ranks, which only these find out."""
    config = jobs.write_inputs(tmp_path, teacher=True)
    with jobs.started(jobs.submit(1, config, f"output={tmp_path / 'run'}", "batch.global=3"), tmp_path) as job:
        assert job.wait(timeout=200) == 2, jobs.said(tmp_path)
    assert jobs.said(tmp_path).count("[rank 0] I runtime:") == 1, "the rank began once"
    assert "batch.global=3, batch.micro=2" in (tmp_path / "said").read_text(), "the job's own output says what to mend"
    assert not (tmp_path / "spool/requeued").exists()
