"""Which interpreter `make` takes for .venv, and what it says where there is none that will do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import ROOT

pytestmark = pytest.mark.slow

HERE = ".".join(map(str, sys.version_info[:2]))
REAL = Path(sys.base_prefix) / f"bin/python{HERE}"


class Machine:
    """A folder with the script, and a PATH of its own."""

    def __init__(self, root: Path):
        self.root, self.path = root / "a path with spaces", root / "bin"
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch/venv.sh", self.root / "launch")
        self.path.mkdir()
        for tool in ("bash", "dirname", "rm", "env"):
            (self.path / tool).symlink_to(shutil.which(tool) or tool)

    def has(self, name: str, version: str | None, modules: bool = True) -> None:
        """A command on PATH: this interpreter, which calls itself `version`, or one that does not run (None)."""
        lines = {
            None: "exit 127",
            HERE: f'[[ $2 != "import venv"* ]] || exit {int(not modules)}; exec {REAL} "$@"',
        }
        told = f"[[ $2 == *'%d.%d'* ]] && echo {version}"
        (self.path / name).write_text("#!/usr/bin/env bash\n" + lines.get(version, told) + "\n")
        (self.path / name).chmod(0o755)

    def make(self, python: str = "") -> tuple[int, str]:
        environment = {"PATH": str(self.path), "PYTHON": python, "HOME": "/nonexistent"}
        done = subprocess.run([self.root / "launch/venv.sh"], env=environment, capture_output=True, text=True, timeout=100, check=False)
        return done.returncode, done.stdout + done.stderr

    def version(self) -> str:
        command = [self.root / ".venv/bin/python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("name", [f"python{HERE}", "python3", "python"])
def test_an_interpreter_under_any_of_its_names_is_taken_and_said(name: str, machine: Machine):
    machine.has("python3.13" if HERE != "3.13" else "python3.12", None)  # a shim of a version that is not active
    machine.has(name, HERE)
    code, said = machine.make()
    assert code == 0, said
    assert f"Python {HERE}." in said
    assert str(machine.path / name) in said
    assert machine.version() == HERE
    assert machine.make() == (0, ""), "what is there is kept"


def test_the_newest_is_asked_first(machine: Machine):
    for minor in (11, 12, 13):
        machine.has(f"python3.{minor}", f"3.{minor}", modules=False)
    code, said = machine.make()
    assert code == 2
    assert "python3.13 (3.13) without venv" in said
    assert "apt-get install python3.13-venv" in said


@pytest.mark.parametrize(
    ("commands", "python", "message"),
    [
        ({}, "", "no Python 3.11, 3.12 or 3.13 on PATH (python3 is absent)"),
        ({"python3": "3.9"}, "", "(python3 is 3.9)"),
        ({"python3.12": None}, "", "apt-get install python3 python3-venv"),
        ({"python3.10": "3.10"}, "python3.10", "PYTHON=python3.10, which is Python 3.10"),
        ({}, "python3.12", "PYTHON=python3.12, which does not run"),
    ],
)
def test_no_interpreter_that_will_do_is_said(commands: dict[str, str | None], python: str, message: str, machine: Machine):
    for name, version in commands.items():
        machine.has(name, version)
    code, said = machine.make(python)
    assert code == 2
    assert message in said
    assert "do:" in said
    assert not (machine.root / ".venv").exists()


def test_another_interpreter_than_that_of_the_environment_is_refused(machine: Machine):
    machine.has(f"python{HERE}", HERE)
    assert machine.make()[0] == 0
    machine.has("other", "3.12" if HERE != "3.12" else "3.13")
    code, said = machine.make("other")
    assert code == 2
    assert f".venv with Python {HERE}, and PYTHON=other" in said
    assert machine.make(f"python{HERE}") == (0, "")


def test_an_environment_that_does_not_work_is_said(machine: Machine):
    machine.has(f"python{HERE}", HERE)
    (machine.root / ".venv/bin").mkdir(parents=True)
    python = machine.root / ".venv/bin/python"
    python.symlink_to("/nonexistent/python")  # of an interpreter that was removed
    assert machine.make()[0] == 2
    assert "whose Python does not run" in machine.make()[1]
    python.unlink()
    subprocess.run([REAL, "-m", "venv", "--without-pip", machine.root / ".venv"], check=True)  # a set-up that was interrupted
    code, said = machine.make()
    assert (code, "without pip" in said) == (2, True)
    assert "rm -r .venv" in said
