"""The traps of installed packages, with false distributions in one process that imports none of them, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

# name of the case: distributions, modules (files of empty content), whether there is a GPU
CASES: dict[str, tuple[dict[str, str], list[str], bool]] = {
    "nothing": ({}, [], False),
    "all there": (
        {"torch": "2.9.0", "megatron-core": "0.17.1", "psutil": "7.0", "transformer-engine": "2.9", "apex": "0.1"},
        ["transformer_engine_torch.py", "apex/optimizers/__init__.py"],
        True,
    ),
    "bare transformer engine": ({"transformer-engine": "2.9"}, ["transformer_engine/__init__.py"], True),
    "pyramid's apex": ({"apex": "0.9.10.dev0"}, ["apex/__init__.py"], True),
    "triton on a CPU": ({"triton": "3.4.0", "liger-kernel": "0.6"}, [], False),
    "unknown megatron": ({"megatron-core": "0.31.0"}, [], False),
}
_SCRIPT = """
import dataclasses, json, sys
root, cases = sys.argv[1], json.loads(sys.argv[2])
plain = [place for place in sys.path if "-packages" not in place]
result = {}
for name, (folder, has_gpu) in cases.items():
    sys.path = [root, folder, *plain]
    from megatron_moe2dense.operations.doctor.packages import packages
    result[name] = {item.name: dataclasses.asdict(item) for item in packages(has_gpu)}
assert not {"torch", "megatron", "transformer_engine", "apex"} & set(sys.modules)
print(json.dumps(result))
"""


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `packages` says in every case."""
    cases = {}
    for name, (distributions, modules, has_gpu) in CASES.items():
        folder = tmp_path_factory.mktemp("site")
        for each, version in distributions.items():
            distribution(folder, each, version)
        for module in modules:
            (folder / module).parent.mkdir(parents=True, exist_ok=True)
            (folder / module).touch()
        cases[name] = (str(folder), has_gpu)
    command = [sys.executable, "-S", "-c", _SCRIPT, str(ROOT), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_a_run_can_not_do_without_is_an_error(reports: dict[str, dict[str, Any]]):
    nothing = reports["nothing"]
    assert {name for name, item in nothing.items() if item["level"] == "error"} == {"torch", "megatron-core", "psutil"}
    assert "saving hangs" in nothing["psutil"]["do"]
    assert nothing["transformer-engine"]["level"] == "fine", "no GPU could use it"


def test_a_complete_machine_has_no_warning(reports: dict[str, dict[str, Any]]):
    assert {item["level"] for item in reports["all there"].values()} == {"fine"}
    assert reports["all there"]["transformer-engine"]["found"] == "2.9"


@pytest.mark.parametrize(
    ("case", "name", "level", "word"),
    [
        ("bare transformer engine", "transformer-engine", "error", "transformer-engine[pytorch]"),
        ("pyramid's apex", "apex", "warning", "pip uninstall apex"),
        ("pyramid's apex", "transformer-engine", "warning", "several times faster"),
        ("triton on a CPU", "triton", "warning", "pip uninstall triton"),
        ("triton on a CPU", "liger-kernel", "warning", "pip uninstall liger-kernel"),
        ("unknown megatron", "megatron-core", "warning", "the tests have run with 0.16 to 0.19"),
    ],
)
def test_a_trap_is_recognised_and_says_what_to_do(case: str, name: str, level: str, word: str, reports: dict[str, dict[str, Any]]):
    item = reports[case][name]
    assert (item["level"], word in item["do"]) == (level, True), item


def test_a_package_that_breaks_the_imports_is_told_of_before_any_import(tmp_path: Path):
    """The bare Transformer Engine raises RuntimeError at import, and takes Megatron-Core's import with it."""
    distribution(tmp_path, "transformer-engine", "2.9")
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("raise RuntimeError('no part for torch')")
    command = [sys.executable, "-m", "megatron_moe2dense", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert "without its part for torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert "would be used" not in done.stdout
