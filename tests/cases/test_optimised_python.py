"""What a user meets under `python -O`, which leaves asserts out."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYER = {"layer": 0, "experts": [3, 1], "group_of": [0, 1], "merge_weights": [1.0, 1.0], "scales": [1.0, 1.0]}
PLAN: dict[str, Any] = {
    "format": 1,
    "source": {"path": "moe", "fingerprint": "0"},
    "family": "qwen3_moe",
    "keep": 2,
    "groups": 2,
    "score": {"method": "sf"},
    "group": None,
    "scale": {"method": "uniform"},
    "layers": [{**LAYER, "shared_scale": 1.0, "align": "none"}],
}
BROKEN = {
    "another format": ({"format": 7}, "format 7, this version reads 1"),
    "an expert twice": ({"layers": [{**PLAN["layers"][0], "experts": [3, 3]}]}, "does not keep 2 distinct experts"),
    "too few scales": ({"layers": [{**PLAN["layers"][0], "scales": [1.0]}]}, "2 scales are needed"),
    "an unknown field": ({"colour": "red"}, "colour"),
}
_READ = """
import sys
from pathlib import Path
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.plan import ConversionPlan
for place in sys.argv[1:]:
    try:
        print(ConversionPlan.read(Path(place)).keep)
    except UserError as error:
        print(error.found)
"""


@pytest.mark.parametrize("options", [[], ["-O"]], ids=["python", "python -O"])
def test_a_plan_is_read_with_and_without_asserts(options: list[str], tmp_path: Path):
    """a plan.json read by `python -O`: a whole one is read, a broken one refused in the words of plain python"""
    files = {"whole": PLAN, **{name: {**PLAN, **changed} for name, (changed, _) in BROKEN.items()}}
    places = []
    for name, content in files.items():
        places.append(tmp_path / f"{name}.json")
        places[-1].write_text(json.dumps(content))
    command = [sys.executable, *options, "-c", _READ, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(zip(files, done.stdout.splitlines(), strict=True))
    assert said.pop("whole") == "2"
    assert all(words in said[name] for name, (_, words) in BROKEN.items()), said


# Of torch without CUDA, of transformers' configs, of Megatron-Core's writers: their raise statements and asserts, not ours.
OF_OTHERS = {"compute/device.py", "families/stock.py", "trainer/runtime/upstream.py"}


def test_no_assert_is_an_answer():
    """a file or a class that does not fit: the answer is an exception of its own, which no option of python leaves out"""
    package = ROOT / "megatron_moe2dense"
    for file in sorted(package.rglob("*.py")):
        handlers = [node.type for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ExceptHandler) and node.type]
        catches = any(getattr(part, "id", "") == "AssertionError" for kind in handlers for part in ast.walk(kind))
        assert not catches or file.relative_to(package).as_posix() in OF_OTHERS, file
