"""Starts processes that were forked from one which has imported everything: real ranks that die real deaths, without the ten seconds
that the imports of each would cost.

- `launch(2, "tests.trainer.cases:distill_all", arguments)` calls a function on every rank of a gloo group; rank 0's result.
- `job = forks().start(arguments, processes=2, fault=...)` runs a moe2dense command. A fault, `(function of tests.trainer.faults,
  arguments)`, is called in every rank before it.
- `forks().commands(folder)` puts `moe2dense`, `torchrun` and `python` for scripts into a folder.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_moe2dense import cli
from megatron_moe2dense.common import outputs
from tests.helpers.distributed import ROOT, environment, free_port


class Job:
    """Ranks that are running, or have ended."""

    def __init__(self, forks: Forks, ranks: list[int], output: Path):
        self._forks, self.ranks, self._output = forks, ranks, output

    def codes(self) -> list[int | None]:
        """Exit codes, negative for a signal, None for a rank that runs."""
        return self._forks.ask({"codes": self.ranks})

    def wait(self, timeout: float = 120) -> list[int]:
        """Until a rank has failed or all are done, then end the others as torchrun does; all exit codes."""
        deadline = time.monotonic() + timeout
        while None in (codes := self.codes()) and not any(codes):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        return self.end()

    def wait_for(self, ranks: list[int], timeout: float = 120) -> list[int | None]:
        """Until these ranks are done; exit codes of all."""
        deadline = time.monotonic() + timeout
        while any((codes := self.codes())[rank] is None for rank in ranks):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        return codes

    def end(self) -> list[int]:
        """Kill the ranks that still run; checkpoint writers live on, as they do under torchrun."""
        for rank, code in zip(self.ranks, self.codes(), strict=True):
            if code is None:
                os.kill(rank, signal.SIGKILL)
        while None in (codes := self.codes()):
            time.sleep(0.01)
        return [code for code in codes if code is not None]

    def said(self, rank: int | None = None) -> str:
        """What one rank, or all, wrote to stderr and stdout."""
        chosen = range(len(self.ranks)) if rank is None else [rank]
        return "".join((self._output / str(number)).read_text() for number in chosen)


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._folder = tempfile.TemporaryDirectory()
        self._address = f"{self._folder.name}/socket"
        with socket.socket(socket.AF_UNIX) as programs:
            programs.bind(self._address)
            programs.listen()
            command = [sys.executable, "-m", "tests.helpers.forks", str(programs.fileno())]
            streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._server = subprocess.Popen(command, env=environment(), cwd=ROOT, pass_fds=[programs.fileno()], **streams)

    def close(self) -> None:
        """End it, and all ranks that are left."""
        for job in self._jobs:
            job.end()
        self._server.communicate()
        self._folder.cleanup()

    def ask(self, question: dict[str, Any]) -> Any:
        """One line there, one back."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(question), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, "the process that forks has died"
        return json.loads(answer)

    def start(self, arguments: list[str], processes: int = 1, fault: tuple[str, list[Any]] | None = None) -> Job:
        """`moe2dense ARGUMENTS` as so many ranks (1: without a process group of its own)."""
        return self._start({"arguments": arguments, "fault": fault, "processes": processes, "group": processes > 1})

    def call(self, target: str, arguments: tuple[Any, ...], processes: int) -> Any:
        """`module:function` on every rank of a gloo group; rank 0's result."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        (folder / "call").write_bytes(pickle.dumps((target, arguments)))
        job = self._start({"call": str(folder), "fault": None, "processes": processes, "group": True})
        codes = job.wait(timeout=600)
        assert not any(codes), job.said()[-6000:]
        return pickle.loads((folder / "result").read_bytes())

    def commands(self, folder: Path) -> None:
        """`moe2dense`, `torchrun [--standalone] --nproc-per-node N -m megatron_moe2dense` and `python SCRIPT` as programs of a script: the
        script's own environment, folder and output, its ranks forked; they exit with the first code that is not 0."""
        folder.mkdir(exist_ok=True)
        for name in ("moe2dense", "torchrun", "python"):
            (folder / name).write_text(f"#!{sys.executable} -SE\n{_PROGRAM.format(address=self._address, name=name)}")
            (folder / name).chmod(0o755)

    def _start(self, what: dict[str, Any]) -> Job:
        output = Path(tempfile.mkdtemp(dir=self._folder.name))
        job = Job(self, self.ask({**what, "port": free_port(), "output": str(output)}), output)
        self._jobs.append(job)
        return job

    def run(self, arguments: list[str], processes: int = 1) -> None:
        """To its end, which has to be a good one."""
        job = self.start(arguments, processes)
        codes = job.wait()
        assert not any(codes), job.said()[-6000:]


_PROGRAM = """
import json, os, socket, sys
arguments, processes = sys.argv[1:], 1
if "{name}" == "torchrun":
    if arguments[0] == "--standalone":
        del arguments[0]
    option, processes, *module = arguments[:4]
    assert (option, module) == ("--nproc-per-node", ["-m", "megatron_moe2dense"]), arguments
    arguments = arguments[4:]
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
asked = dict(program=sys.argv[0], arguments=arguments, processes=int(processes), folder=os.getcwd(), environment=dict(os.environ))
asked["group"] = "{name}" == "torchrun"
text = json.dumps(asked).encode()
socket.send_fds(server, [len(text).to_bytes(8, "big")], [1, 2])
server.sendall(text)
sys.exit(int(server.recv(16) or 1))
"""


@functools.cache
def forks() -> Forks:
    """Of this process, to its end: its imports are paid once."""
    started = Forks()
    atexit.register(started.close)
    return started


def launch(processes: int, target: str, *arguments: Any) -> Any:
    """Call `module:function` with picklable arguments on every rank; a failing rank fails the test with its output."""
    return forks().call(target, arguments, processes)


def _rank(job: dict[str, Any], rank: int) -> None:
    """The life of a forked rank."""
    os.setsid()
    if "streams" in job:
        outputs_of_rank = job["streams"]
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.executable = str(Path(job["program"]).absolute().with_name("python"))
    else:
        outputs_of_rank = [os.open(Path(job["output"]) / str(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)] * 2
    for stream, output in zip((1, 2), outputs_of_rank, strict=True):
        os.dup2(output, stream)
    if job["group"]:
        size, address = str(job["processes"]), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, **address})
    if job.get("fault") is not None:
        name, arguments = job["fault"]
        getattr(importlib.import_module("tests.trainer.faults"), name)(rank, *arguments)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if "call" in job:
        _call(Path(job["call"]))
        return
    if Path(job.get("program", "")).name == "python":
        _script(job["arguments"])
    else:
        cli.main(job["arguments"])


def _script(arguments: list[str]) -> None:
    """`python SCRIPT ...`, `python -m MODULE ...` or `python -c CODE`."""
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _call(folder: Path) -> None:
    import torch.distributed as dist

    target, arguments = pickle.loads((folder / "call").read_bytes())
    module, _, name = target.partition(":")
    dist.init_process_group("gloo")
    value = getattr(importlib.import_module(module), name)(*arguments)
    if dist.get_rank() == 0:
        (folder / "result").write_bytes(pickle.dumps(value))
    dist.barrier()
    dist.destroy_process_group()


def _fork(job: dict[str, Any], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _rank(job, rank)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# What commands, Megatron-Core and transformers import when they run: a rank would pay for each again.
_IMPORTED_LATE = (
    "megatron_moe2dense.trainer.verification.stock",
    "megatron_moe2dense.trainer.runtime.cpu",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.torch",
    "transformers.generation.utils",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.gpt_oss.modeling_gpt_oss",
)


def _serve(programs: socket.socket) -> None:
    commands = (f"megatron_moe2dense.{command.run.partition(':')[0]}" for command in cli.COMMANDS.values())
    for name in (*commands, *_IMPORTED_LATE):
        importlib.import_module(name)
    outputs.versions(), outputs.commit()  # what they read is kept
    gc.freeze()  # ranks need not look through all imports for cycles, nor copy them as they do
    answers = os.fdopen(os.dup(1), "w")
    ended: dict[int, int] = {}
    running: dict[socket.socket, list[int]] = {}
    while True:
        readable, _, _ = select.select([0, programs], [], [], 0.02 if running else None)
        if programs in readable:
            program, job = _asked(programs)
            running[program] = [_fork(job, rank) for rank in range(job["processes"])]
            for stream in job["streams"]:
                os.close(stream)
        for program, children in list(running.items()):
            codes = _codes(children, ended)
            if any(codes) or None not in codes:
                program.sendall(str(next(filter(None, codes), 0)).encode())
                program.close()
                del running[program]
        if 0 in readable:
            line = _line()
            if not line:
                return
            question = json.loads(line)
            if "codes" in question:
                answer: list[Any] = _codes(question["codes"], ended)
            else:
                answer = [_fork(question, rank) for rank in range(question["processes"])]
            print(json.dumps(answer), file=answers, flush=True)


def _asked(programs: socket.socket) -> tuple[socket.socket, dict[str, Any]]:
    program, _ = programs.accept()
    size, streams, _, _ = socket.recv_fds(program, 8, 2)
    text = program.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    return program, {**json.loads(text), "streams": streams, "port": free_port()}


def _line() -> str:
    """Of stdin, read byte by byte: `select` does not see what a buffer holds."""
    found = b""
    while not found.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return ""
        found += byte
    return found.decode()


def _codes(children: list[int], ended: dict[int, int]) -> list[int | None]:
    for child in children:
        if child not in ended:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
    return [ended.get(child) for child in children]


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
