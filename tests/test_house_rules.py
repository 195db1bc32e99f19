"""The arrows between the packages and the size caps, read from the source with ast (house rules in CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_moe2dense.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_moe2dense"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("tests", "examples", "benchmarks", "docker", "launch", "studies")
SCRIPTS = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

# Who may import whom inside the package, besides itself.
GROUND = {"common", "checkpoint", "tokens", "families"}
ARROWS = {
    "common": set(),
    "checkpoint": {"common"},
    "tokens": {"common"},
    "families": {"common"},
    "surgery": GROUND,
    "trainer": GROUND,
    "evals": GROUND,
    "plots": GROUND,
    "operations": GROUND | {"trainer"},
    "cli": GROUND,  # commands are imported by name when they run
    "sweep": GROUND | {"surgery", "evals"},
    "__main__": {"cli"},
    "__init__": set(),
}
# Libraries that belong to one part: which parts or files may import them.
LIBRARIES = {
    "megatron": {"trainer"},
    # trainer/verification/stock.py alone: the teacher's forward is compared with transformers' before step 0
    "transformers": {"surgery", "evals", "trainer/verification/stock.py"},
    "torch": {"checkpoint", "surgery", "trainer", "operations", "evals", "sweep"},
    "matplotlib": {"plots"},
    "lm_eval": {"evals"},
    "wandb": {"trainer"},
}
FILE_LINES, FUNCTION_LINES, PARAMETERS, DOCSTRING_LINES = 300, 60, 5, 5


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _part(file: Path) -> str:
    """`surgery` for surgery/score.py, `cli` for cli.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, inside functions too."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(_tree(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_every_part_has_its_arrows():
    assert {_part(file) for file in MODULES} <= set(ARROWS)


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_imports_follow_the_arrows(file: Path):
    part = _part(file)
    for line, name in _imports(file):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top == "megatron_moe2dense" and other in ARROWS:
            assert other == part or other in ARROWS[part], f"{_name(file)}:{line}: {part} must not import {other}"
        allowed = LIBRARIES.get(top, {part})
        assert allowed & {part, file.relative_to(PACKAGE).as_posix()}, f"{_name(file)}:{line}: only {sorted(allowed)} may import {top}"


@pytest.mark.parametrize("file", [file for file in MODULES if _part(file) not in ("families", "trainer")], ids=_name)
def test_only_the_trainer_names_megatron_core(file: Path):
    # Also by importlib, which the walk over import statements does not see.
    strings = [node.value for node in ast.walk(_tree(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in strings if text.startswith("megatron.core") and "\n" not in text and " " not in text]


@pytest.mark.parametrize("file", [file for file in MODULES if _part(file) != "families"], ids=_name)
def test_a_model_type_stands_only_in_families(file: Path):
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in FAMILIES, f"{_name(file)}:{node.lineno}: {node.value!r} belongs to families/"


@pytest.mark.parametrize("file", MODULES + SCRIPTS, ids=_name)
def test_files_and_functions_stay_small(file: Path):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"{_name(file)}: {lines} lines"
    for function in _functions(file):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= FUNCTION_LINES, f"{_name(file)}:{function.lineno}: {function.name} has {length} lines"
        arguments = function.args
        names = [item.arg for item in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        count = len([name for name in names if name not in ("self", "cls", "ctx")])
        assert count <= PARAMETERS, f"{_name(file)}:{function.lineno}: {function.name} takes {count} parameters"


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_modules_say_what_they_are(file: Path):
    docstring = ast.get_docstring(_tree(file))
    assert docstring, f"{_name(file)}: no module docstring"
    if file != PACKAGE / "__init__.py":  # holds the legend of the shape letters
        assert len(docstring.splitlines()) <= DOCSTRING_LINES, f"{_name(file)}: a docstring of {len(docstring.splitlines())} lines"


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_no_global_statement(file: Path):
    assert not [node.lineno for node in ast.walk(_tree(file)) if isinstance(node, ast.Global)]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


HEAVY = "assert not {'torch', 'transformers', 'megatron.core', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"


def test_help_imports_no_torch():
    result = _python(
        f"import sys\nfrom megatron_moe2dense.cli import main\nfor argv in ([], ['--help'], ['data', '--help']): main(argv)\n{HEAVY}"
    )
    assert result.returncode == 0, result.stderr


def test_config_modules_import_no_torch():
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in MODULES if file.name == "config.py"]
    assert len(modules) > 4
    result = _python(f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n{HEAVY}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("part", ["common", "families", "tokens"])
def test_the_ground_imports_no_torch(part: str):
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in MODULES if _part(file) == part]
    result = _python(f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n{HEAVY}")
    assert result.returncode == 0, result.stderr
