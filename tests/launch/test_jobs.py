"""A job goes through everything a cluster does to it, and ends as one process that nobody disturbed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_moe2dense import cli
from megatron_moe2dense.common import records
from megatron_moe2dense.trainer.checkpoints.writer import latest, step_of
from tests.launch import jobs

pytestmark = pytest.mark.distributed


def test_a_job_on_two_nodes_stopped_requeued_on_one_and_robbed_of_a_rank_ends_like_one_process(tmp_path: Path):
    config, run = jobs.write_inputs(tmp_path, teacher=False), tmp_path / "run"
    with jobs.started(jobs.submit(2, config, f"output={run}"), tmp_path, SLURM_JOB_ID="4711") as job:
        jobs.wait_until(job, lambda: jobs.last_step(run) >= 3)
        assert len(jobs.agents(job)) == len(jobs.ranks(job)) == 2
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=200) == 0, jobs.said(tmp_path)
    assert (tmp_path / "spool/requeued").read_text() == "4711\n"
    saved = latest(run / "checkpoints")
    assert saved is not None
    assert 3 <= step_of(saved) == jobs.last_step(run) < jobs.STEPS

    with jobs.started(jobs.submit(1, config, f"output={run}"), tmp_path, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="1") as job:
        jobs.wait_until(job, lambda: jobs.last_step(run) >= step_of(saved) + 7)
        [rank] = jobs.ranks(job)
        rank.kill()
        assert job.wait(timeout=200) == 0, jobs.said(tmp_path)
    assert (tmp_path / "spool/requeued").read_text() == "4711\n", "a finished job stays out of the queue"
    logs = sorted(file.parts[-3] for file in (tmp_path / "logs/node_0").glob("*/attempt_*/0/stderr.log"))
    assert logs == ["attempt_0", "attempt_0", "attempt_1"], "one file for each start of a rank"

    cli.main(["distill", str(config), f"output={tmp_path / 'straight'}"])
    jobs.assert_same_run(run, tmp_path / "straight")
    assert len(records.read(run / "metrics.jsonl")) == jobs.STEPS
