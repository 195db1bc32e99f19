"""Run a test function in several gloo processes: one torchrun spawn (its imports are slow), many cases inside.

`launch(2, "tests.trainer.cases:distill_all", arguments)` calls the function on every rank and returns rank 0's result.
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """One thread a process and the loopback interface, so that several jobs do not spin against each other."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # an unpacked Megatron-Core may be on it
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    """Of this machine, at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(processes: int) -> list[str]:
    """The start of a torchrun command on a free port."""
    options = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def launch(processes: int, target: str, *arguments: Any) -> Any:
    """Call `module:function` with picklable arguments on every rank; a failing rank fails the test with its output."""
    with tempfile.TemporaryDirectory() as folder:
        call, result = Path(folder) / "call", Path(folder) / "result"
        call.write_bytes(pickle.dumps((target, arguments)))
        command = [*torchrun(processes), "-m", "tests.helpers.distributed", str(call), str(result)]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        return pickle.loads(result.read_bytes())


def _worker(call: Path, result: Path) -> None:
    import torch.distributed as dist

    target, arguments = pickle.loads(call.read_bytes())
    module, _, name = target.partition(":")
    dist.init_process_group("gloo")
    value = getattr(importlib.import_module(module), name)(*arguments)
    if dist.get_rank() == 0:
        result.write_bytes(pickle.dumps(value))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), Path(sys.argv[2]))
