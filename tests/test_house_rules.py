"""The house rules of CONTRIBUTING.md, read from the source with ast: each test walks all files and names every offender."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from megatron_moe2dense.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_moe2dense"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("tests", "examples", "benchmarks", "docker", "launch", "studies")
SCRIPTS = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

# Who may import whom inside the package, besides itself.
GROUND = {"common", "checkpoint", "tokens", "families", "compute"}
ARROWS = {
    "common": set(),
    "checkpoint": {"common"},
    "tokens": {"common"},
    "families": {"common", "checkpoint"},
    "compute": {"common"},
    "surgery": GROUND,
    "trainer": GROUND,
    "evals": GROUND,
    "serving": GROUND | {"trainer"},
    "plots": GROUND,
    "operations": GROUND | {"trainer"},
    "cli": GROUND,  # commands are imported by name when they run
    "sweep": GROUND | {"surgery", "evals"},
    "init": GROUND | {"surgery", "operations", "trainer"},
    "__main__": {"cli"},
    "__init__": set(),
}
# What of the families looks at stock classes: imported when a checkpoint is opened, not before.
OPENED = {
    f"families/{name}.py"
    for name in ("stock", "ffn", "disk", "probe", "candidates", "dense", "alike", "account", "pretrained", "tokenized", "written")
}
# Libraries that belong to some parts: which parts or files may import them.
LIBRARIES = {
    "megatron": {"trainer"},
    "transformers": {"surgery", "evals", "serving", *OPENED},
    "torch": {"checkpoint", "compute", "surgery", "trainer", "operations", "evals", "serving", "sweep", *OPENED},
    "matplotlib": {"plots"},
    "lm_eval": {"evals"},
    "wandb": {"trainer"},
    "compressed_tensors": {"serving"},
    "huggingface_hub": {"common", "evals"},
}
FILE_LINES, FUNCTION_LINES, PARAMETERS, DOCSTRING_LINES = 400, 80, 7, 5

Offences = Iterator[tuple[int, str]]  # line, what is wrong there


def hold(rule: Callable[[Path], Offences], files: Iterable[Path]) -> None:
    """Fails with every place where a file breaks the rule."""
    found = [f"{_name(file)}:{line}: {wrong}" for file in files for line, wrong in rule(file)]
    assert not found, "\n" + "\n".join(found)


@cache
def _nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def _part(file: Path) -> str:
    """`surgery` for surgery/score.py, `cli` for cli.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _outside(*parts: str) -> list[Path]:
    return [file for file in MODULES if _part(file) not in parts]


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too."""
    for node in _nodes(file):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def _strings(file: Path) -> Iterator[tuple[int, str]]:
    return ((node.lineno, node.value) for node in _nodes(file) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in _nodes(file) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_every_part_has_its_arrows():
    assert {_part(file) for file in MODULES} <= set(ARROWS)


def test_imports_are_absolute():
    hold(lambda file: ((line, f"imports {name}") for line, name in _imports(file) if name.startswith(".")), MODULES)


def test_imports_follow_the_arrows():
    def rule(file: Path) -> Offences:
        part = _part(file)
        for line, name in _imports(file):
            top, other = (name + ".").split(".")[:2]
            if top == PACKAGE.name and other in ARROWS and other not in {part, *ARROWS[part]}:
                yield line, f"{part} must not import {other}"

    hold(rule, MODULES)


def test_a_library_is_imported_by_its_own_parts_alone():
    def rule(file: Path) -> Offences:
        for line, name in _imports(file):
            allowed = LIBRARIES.get(name.split(".")[0])
            if allowed is not None and not allowed & {_part(file), file.relative_to(PACKAGE).as_posix()}:
                yield line, f"only {sorted(allowed)} may import {name}"

    hold(rule, MODULES)


def test_only_the_trainer_names_megatron_core():
    # Also by importlib, which the walk over import statements does not see.
    def rule(file: Path) -> Offences:
        return ((line, text) for line, text in _strings(file) if text.startswith("megatron.core") and not {"\n", " "} & set(text))

    hold(rule, _outside("families", "trainer"))


def test_a_model_type_stands_only_in_families():
    hold(lambda file: ((line, f"{text!r} belongs to families/") for line, text in _strings(file) if text in FAMILIES), _outside("families"))


def test_files_stay_small():
    def rule(file: Path) -> Offences:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            yield lines, f"more than {FILE_LINES} lines"

    hold(rule, MODULES + SCRIPTS)


def test_functions_stay_small():
    def rule(file: Path) -> Offences:
        for function in _functions(file):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > FUNCTION_LINES:
                yield function.lineno, f"{function.name} has {length} lines"
            arguments = function.args
            names = {item.arg for item in arguments.posonlyargs + arguments.args + arguments.kwonlyargs} - {"self", "cls", "ctx"}
            if len(names) > PARAMETERS:
                yield function.lineno, f"{function.name} takes {len(names)} parameters"

    hold(rule, MODULES + SCRIPTS)


def test_the_document_says_the_same_caps():
    caps = f"{FILE_LINES} lines a file, {FUNCTION_LINES} a function, {PARAMETERS} parameters"
    assert caps in (ROOT / "CONTRIBUTING.md").read_text()


def test_modules_say_what_they_are():
    def rule(file: Path) -> Offences:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        lines = len(docstring.splitlines())
        if not lines:
            yield 1, "no module docstring"
        if lines > DOCSTRING_LINES and file != PACKAGE / "__init__.py":  # holds the legend of the shape letters
            yield 1, f"a docstring of {lines} lines"

    hold(rule, MODULES)


def test_no_global_statement():
    hold(lambda file: ((node.lineno, "global") for node in _nodes(file) if isinstance(node, ast.Global)), MODULES)


def without_heavy_libraries(calls: dict[str, str]) -> None:
    """Runs the statements in one process; fails with the first after which a heavy library is there."""
    heavy = "{'torch', 'transformers', 'megatron.core', 'matplotlib'} & set(sys.modules)"
    lines = [f"{statement}\nassert not {heavy}, ({name!r}, sorted({heavy}))" for name, statement in calls.items()]
    code = "\n".join(["import sys, importlib", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_no_torch():
    main = "from megatron_moe2dense.cli import main; main"
    without_heavy_libraries({"no command": f"{main}([])", "--help": f"{main}(['--help'])", "data --help": f"{main}(['data', '--help'])"})


def test_the_ground_and_configs_import_no_torch():
    light = [file for file in MODULES if _part(file) in ("common", "families", "tokens") or file.name == "config.py"]
    light = [file for file in light if file.relative_to(PACKAGE).as_posix() not in OPENED]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in light]
    assert len([name for name in names if name.endswith(".config")]) > 4
    without_heavy_libraries({name: f"importlib.import_module({name!r})" for name in names})
