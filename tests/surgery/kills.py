"""Runs one moe2dense command again and again, killing it with SIGKILL at random moments, until it has been killed often enough.

A process of its own, which imports everything once and forks a child for every start: each child is a real process that dies a real
death, without the seconds that imports cost. Prints a JSON object: kills, and how often the command was done before its kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import megatron_moe2dense.surgery.calibrate
import megatron_moe2dense.surgery.convert
import megatron_moe2dense.surgery.prune_dense.prune  # noqa: F401
from megatron_moe2dense.cli import main


def start(arguments: list[str]) -> int:
    """Fork a child that runs the command; its number."""
    child = os.fork()
    if child == 0:
        try:
            main(arguments)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> bool:
    """Whether the child is done; an error in it ends everything."""
    found, status = os.waitpid(child, os.WNOHANG)
    assert found == 0 or status == 0, f"the command failed with status {status}"
    return found != 0


def finish(arguments: list[str]) -> None:
    """Run the command to its end."""
    child = start(arguments)
    until(lambda: ended(child))


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    while not condition():
        time.sleep(0.001)


def killed_at_random(arguments: list[str], working: Path, longest: float) -> bool:
    """Start the command and kill it up to `longest` seconds after its working directory is there; False when it was done before."""
    child = start(arguments)
    done = [False]

    def there_or_done() -> bool:
        done[0] = ended(child)
        return done[0] or working.exists()

    until(there_or_done)
    deadline = time.monotonic() + random.uniform(0, longest)
    while not done[0] and time.monotonic() < deadline:
        done[0] = ended(child)
        time.sleep(0.0005)
    if done[0]:
        return False
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def run(arguments: list[str], outputs: list[Path], kills: int) -> dict[str, int]:
    """Kill the command `kills` times, then let it end. A run that ended before its kill is checked to be whole and removed."""
    begin = time.monotonic()
    finish(arguments)
    longest = time.monotonic() - begin
    expected = [content(output) for output in outputs]
    found = {"kills": 0, "done": 0}
    while True:
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
        while found["kills"] < kills and killed_at_random(arguments, outputs[0].with_name(outputs[0].name + ".tmp"), longest):
            found["kills"] += 1
            for output, files in zip(outputs, expected, strict=True):
                assert not output.exists() or content(output) == files, f"{output} stands half done"
            if all(output.exists() for output in outputs):  # killed after the last rename: there is nothing left to do
                break
        if any(not output.exists() for output in outputs):
            finish(arguments)
        found["done"] += 1
        assert [content(output) for output in outputs] == expected, "resumed runs end with other bytes"
        assert not [output for output in outputs if output.with_name(output.name + ".tmp").exists()], "working files are left"
        if found["kills"] >= kills:
            return found


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory; of the manifest everything but the commit, which somebody may add to meanwhile."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    manifest = json.loads(found["moe2dense.json"])
    manifest.pop("commit")
    return {**found, "moe2dense.json": json.dumps(manifest).encode()}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    sys.stdout, stdout = sys.stderr, sys.stdout
    print(json.dumps(run(job["arguments"], [Path(output) for output in job["outputs"]], job["kills"])), file=stdout)
