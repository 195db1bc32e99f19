"""What the launch scripts hand on, and what they make of each ending. Slurm and torchrun are stand-ins that note how they are called."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense import cli
from megatron_moe2dense.common import restarts
from tests.helpers.distributed import ROOT
from tests.launch.jobs import variables

NODE = ROOT / "launch/node.sh"
DISTILL = ("sbatch", "--nodes", "1", ROOT / "launch/distill.slurm")


def begin(
    folder: Path, command: tuple[Any, ...], outcomes: tuple[str, ...] = ("exit 0",), cwd: Path = ROOT, **more: str
) -> subprocess.Popen[str]:
    """Start a script; `outcomes` are what torchrun does each time."""
    environment = variables(folder, PYTHON=str(ROOT / "tests/launch/stub_python"), REAL_PYTHON=sys.executable, **more)
    (folder / "spool/outcomes").write_text("\n".join(outcomes))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(item) for item in command], cwd=cwd, env=environment, text=True, **pipes)


def run(folder: Path, command: tuple[Any, ...], outcomes: tuple[str, ...] = ("exit 0",), cwd: Path = ROOT, **more: str) -> tuple[int, str]:
    """Exit status, and what was said on stderr."""
    job = begin(folder, command, outcomes, cwd, **more)
    errors = job.communicate(timeout=100)[1]
    return job.returncode, errors


def started(folder: Path, what: str = "torch.distributed.run") -> list[dict[str, Any]]:
    """The notes of every start."""
    notes = folder / "spool/started"
    rows = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    return [row for row in rows if any(argument.endswith(what) for argument in row["arguments"])]


def of_srun(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "spool/srun").read_text().splitlines()[-1])


def requeued(folder: Path) -> bool:
    return (folder / "spool/requeued").exists()


def finish(folder: Path) -> None:
    """The run has reached its last step."""
    (folder / "spool/run").mkdir()
    (folder / "spool/run/moe2dense.json").write_text('{\n  "status": "finished"\n}\n')


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.mark.parametrize("script", ["distill.slurm", "calibrate.slurm"])
def test_arguments_reach_every_node_as_they_were_given(script: str, tmp_path: Path):
    given = ["a b.yaml", "loss={method: kl}", "data.path=it's $HOME *"]
    variables(tmp_path)
    finish(tmp_path)
    command = ("sbatch", "--nodes", "2", ROOT / "launch" / script, *given)
    status, errors = run(tmp_path, command, ("exit 0", "exit 0"), SLURM_JOB_ID="50123")
    assert status == 0, errors
    agents = started(tmp_path)
    assert [row["arguments"][-4:] for row in agents] == [[script.removesuffix(".slurm"), *given]] * 2
    assert sorted(row["NODE_RANK"] for row in agents) == ["0", "1"]
    for row in agents:
        assert option(row["arguments"], "--nnodes") == "2"
        assert option(row["arguments"], "--rdzv-endpoint") == "127.0.0.1:20123", "the first host of the list, a port of the job's number"
        assert option(row["arguments"], "--rdzv-id") == "50123.0"
    [store] = started(tmp_path, "launch/rendezvous.py")
    assert store["NODE_RANK"] == "0"
    assert not requeued(tmp_path)


def test_paths_are_from_where_the_user_stands(tmp_path: Path):
    """Submitted or started in another folder than the checkout: its files are meant, and the logs are there."""
    stands = tmp_path / "somewhere"
    stands.mkdir()
    variables(tmp_path)
    finish(tmp_path)
    for command in ((*DISTILL, "a.yaml"), (ROOT / "launch/distill_torchrun.sh", "a.yaml")):
        status, errors = run(tmp_path, command, cwd=stands, LOG_DIR="logs")
        assert status == 0, errors
        assert started(tmp_path)[-1]["cwd"] == str(stands)
        assert (stands / "logs").is_dir()
        shutil.rmtree(stands / "logs")


def test_commands_without_gpus_are_jobs_too(tmp_path: Path):
    """launch/cpu.slurm COMMAND, after another job where --dependency says so; its exit status is the command's."""
    command = ("sbatch", "--parsable", "--dependency=afterok:7", ROOT / "launch/cpu.slurm", "convert", "a b.yaml", "keep=8")
    for outcome, expected in (("exit 0", 0), ("exit 2", 2)):
        status, _ = run(tmp_path, command, (outcome,), cwd=tmp_path, SLURM_CPUS_PER_TASK="16")
        assert status == expected
        row = started(tmp_path, "convert")[-1]
        assert (row["arguments"], row["cwd"]) == (["-m", "megatron_moe2dense", "convert", "a b.yaml", "keep=8"], str(tmp_path))


def test_the_environment_overrides_every_default(tmp_path: Path):
    status, errors = run(tmp_path, (NODE, "calibrate", "a.yaml"), OMP_NUM_THREADS="3", NCCL_DEBUG="INFO", RESTARTS="7", PROCESSES="4")
    assert status == 0, errors
    [row] = started(tmp_path)
    found = {name: row[name] for name in ("OMP_NUM_THREADS", "NCCL_DEBUG", "NCCL_IB_TIMEOUT", "CUDA_DEVICE_MAX_CONNECTIONS")}
    assert found == {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO", "NCCL_IB_TIMEOUT": "22", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert option(row["arguments"], "--max-restarts") == "7"
    assert option(row["arguments"], "--nproc-per-node") == "4"


@pytest.mark.slow
def test_a_container_is_asked_for_only_when_there_is_an_image(tmp_path: Path):
    finish_first = variables(tmp_path)
    assert finish_first
    finish(tmp_path)
    run(tmp_path, (*DISTILL, "a.yaml"))
    assert of_srun(tmp_path)["container_image"] is None
    run(tmp_path, (*DISTILL, "a.yaml"), CONTAINER_IMAGE="moe2dense.sqsh", CONTAINER_MOUNTS="/data:/data")
    assert (of_srun(tmp_path)["container_image"], of_srun(tmp_path)["container_mounts"]) == ("moe2dense.sqsh", "/data:/data")
    status, errors = run(tmp_path, (*DISTILL, "a.yaml"), CONTAINER_MOUNTS="/data:/data")
    assert status == 2
    assert "would have no effect" in errors


@pytest.mark.slow
def test_the_slices_of_an_array_are_all_slices(tmp_path: Path):
    sweep = ROOT / "launch/sweep_array.slurm"
    found = []
    for number in (2, 4, 6):
        command = ("sbatch", "--nodes", "1", "--array", "2-6:2", sweep, "sweep.yaml")
        status, errors = run(tmp_path, command, SLURM_ARRAY_TASK_ID=str(number))
        assert status == 0, errors
        found.append(started(tmp_path)[-1]["arguments"][-3:])
    assert found == [["sweep", "sweep.yaml", f"slice={part}/3"] for part in (1, 2, 3)]
    status, errors = run(tmp_path, ("sbatch", "--nodes", "1", "--array", "1,2,6", sweep, "sweep.yaml"), SLURM_ARRAY_TASK_ID="2")
    assert status == 2
    assert "gaps" in errors


@pytest.mark.parametrize(
    ("outcomes", "starts", "status"),
    [
        (("die", "exit 0"), 2, 0),  # only an agent that was killed
        (("exit 1",), 1, 1),  # torchrun has restarted its ranks as often as it may
        (("die", "die", "die"), 3, 137),
        (("refuse",), 1, 2),
    ],
)
def test_an_agent_is_started_again_when_it_was_killed_and_only_then(outcomes: tuple[str, ...], starts: int, status: int, tmp_path: Path):
    found, _ = run(tmp_path, (NODE, "calibrate", "a.yaml"), outcomes, RESTARTS="2")
    assert (found, len(started(tmp_path))) == (status, starts)


@pytest.mark.parametrize(("outcome", "status"), [("refuse", 2), ("exit 1", 1)])
def test_a_job_that_failed_or_was_refused_is_not_requeued(outcome: str, status: int, tmp_path: Path):
    found, errors = run(tmp_path, (*DISTILL, "a.yaml"), (outcome,))
    assert found == status
    assert not requeued(tmp_path)
    assert ("found: a trap" in errors) == (outcome == "refuse"), "the job's own output says what the user has to mend"


@pytest.mark.slow
def test_a_job_that_ends_before_its_last_step_is_requeued_unless_that_is_forbidden(tmp_path: Path):
    assert run(tmp_path, (*DISTILL, "a.yaml"), REQUEUE="0")[0] == 0
    assert not requeued(tmp_path)
    assert run(tmp_path, (*DISTILL, "a.yaml"))[0] == 0
    assert requeued(tmp_path)
    finish(tmp_path)
    again = run(tmp_path, (*DISTILL, "a.yaml"), SLURM_RESTART_COUNT="1")
    assert again[0] == 0
    assert len(started(tmp_path)) == 2, "nothing is left to do"


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_calibration_is_ended_by_a_signal_and_requeued_before_its_time_only(number: signal.Signals, again: bool, tmp_path: Path):
    """SIGTERM is a cancelled job, or a preempted one that Slurm itself requeues."""
    job = begin(tmp_path, ("sbatch", "--nodes", "1", ROOT / "launch/calibrate.slurm", "a.yaml"), ("stop",))
    while not (tmp_path / "spool/running").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(number)
    job.communicate(timeout=60)
    assert requeued(tmp_path) == again


def quickstart(machine: Path) -> str:
    """What the script prints where every command only writes down how it was called."""
    (machine / "launch").mkdir(parents=True)
    (machine / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "launch/quickstart_cpu.sh", machine / "launch")
    for name in ("moe2dense", "torchrun", "python"):
        (machine / ".venv/bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n')
        (machine / ".venv/bin" / name).chmod(0o755)
    run = [machine / "launch/quickstart_cpu.sh"]
    return subprocess.run(run, env={"PATH": os.environ["PATH"]}, capture_output=True, check=True, text=True).stdout


def test_the_quickstart_needs_no_port_of_its_own_and_no_name_of_the_machine(tmp_path: Path):
    machine = tmp_path / "a path with spaces"
    quickstart(machine)
    (torchrun,) = [line.split() for line in (machine / "calls").read_text().splitlines() if line.startswith("torchrun")]
    assert "--master-port" not in torchrun, "another run may have it"
    assert "--standalone" in torchrun
    assert torchrun[torchrun.index("--local-addr") + 1] == "127.0.0.1"


def test_the_quickstart_ends_with_how_its_export_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = quickstart(tmp_path / "machine").partition("is served as it is")[2].splitlines()
    assert {"vllm serve out/quickstart/export", "transformers serve out/quickstart/export"} <= {line[19:] for line in said}
    commands = [shlex.split(line.partition("moe2dense ")[2]) for line in said if "moe2dense " in line]
    assert [command[0] for command in commands] == ["export", "serve-check"]
    for command in commands:
        cli.main([*command, "--print-config"])
    assert "format: gguf" in capsys.readouterr().out


def test_ranks_of_a_refused_job_end_before_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MOE2DENSE_USER_ERROR", str(tmp_path / "user_error"))
    assert not restarts.noted()
    for _ in range(2):
        with pytest.raises(SystemExit) as refused:
            cli.main(["calibrat"])
        assert refused.value.code == 2
    assert (tmp_path / "user_error").read_text() == capsys.readouterr().err, "said once, by the first"
