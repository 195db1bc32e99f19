"""Runs one moe2dense command again and again, killing it with SIGKILL at random moments, until it has been killed often enough."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

from tests.helpers.forks import Job, forks


def ended(job: Job) -> bool:
    """Whether the command is done; an error in it ends everything."""
    [code] = job.codes()
    assert not code, job.said()
    return code is not None


def killed_at_random(arguments: list[str], working: Path, longest: float) -> bool:
    """Start the command and kill it up to `longest` seconds after its working directory is there; False when it was done before."""
    job = forks().start(arguments)
    while not (done := ended(job)) and not working.exists():
        time.sleep(0.001)
    deadline = time.monotonic() + random.uniform(0, longest)
    while not (done := done or ended(job)) and time.monotonic() < deadline:
        time.sleep(0.0005)
    return not done and job.end() == [-signal.SIGKILL]


def assert_the_same_bytes_when_killed(arguments: list[str], outputs: list[Path], kills: int) -> None:
    """Kill the command `kills` times, then let it end. A run that ended before its kill is checked to be whole and removed."""
    begin = time.monotonic()
    forks().run(arguments)
    longest = time.monotonic() - begin
    expected = [content(output) for output in outputs]
    killed = 0
    while True:
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
        while killed < kills and killed_at_random(arguments, outputs[0].with_name(outputs[0].name + ".tmp"), longest):
            killed += 1
            for output, files in zip(outputs, expected, strict=True):
                assert not output.exists() or content(output) == files, f"{output} stands half done"
            if all(output.exists() for output in outputs):  # killed after the last rename: there is nothing left to do
                break
        if any(not output.exists() for output in outputs):
            forks().run(arguments)
        assert [content(output) for output in outputs] == expected, "resumed runs end with other bytes"
        assert not [output for output in outputs if output.with_name(output.name + ".tmp").exists()], "working files are left"
        if killed >= kills:
            return


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory; of the manifest everything but the commit, which somebody may add to meanwhile."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    manifest = json.loads(found["moe2dense.json"])
    manifest.pop("commit")
    return {**found, "moe2dense.json": json.dumps(manifest).encode()}
