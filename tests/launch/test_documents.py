"""The commands of the documents: those of launch/ run with stand-ins for torchrun and Slurm, all others resolve to a configuration."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe2dense import cli
from tests.helpers.distributed import ROOT
from tests.launch.jobs import variables
from tests.launch.test_scripts import finish

DOCUMENTS = [ROOT / "docs/operations.md", ROOT / "docker/README.md", ROOT / "README.md"]
# What stands for the reader's own file: the quickstart's of that command, or a run on GPUs for those that read a YAML of distill.
YAMLS, GPU_RUN = ROOT / "yaml_configs/quickstart", ROOT / "yaml_configs/qwen3_30b_a3b/distill.yaml"


def commands(document: Path) -> list[str]:
    """The lines of all bash blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


ALL = [(document.name, line) for document in DOCUMENTS for line in commands(document)]
LAUNCHED = sorted(
    {line for _, line in ALL if "launch/" in line and not re.search(r"docker|--wrap|--dependency|--parsable|reproduce|/run\.sh", line)}
)
RESOLVED = sorted({line for _, line in ALL if re.match(r"(moe2dense|torchrun)\b", line)})


def test_the_documents_have_commands_of_both_kinds():
    assert len(LAUNCHED) >= 5
    assert len(RESOLVED) >= 10


@pytest.mark.slow
def test_commands_of_the_launch_scripts_start_what_they_say(tmp_path: Path):
    for number, line in enumerate(LAUNCHED):
        folder = tmp_path / str(number)
        environment = variables(folder, PYTHON=str(ROOT / "tests/launch/stub_python"), REAL_PYTHON=sys.executable)
        finish(folder)
        nodes = int((re.search(r"--nodes (\d+)", line) or [0, 1])[1])
        (folder / "spool/outcomes").write_text("exit 0\n" * nodes)
        done = subprocess.run(
            ["bash", "-c", line.replace("LOG_DIR=out", f"LOG_DIR={folder}")],
            cwd=ROOT,
            env=environment | {"SLURM_ARRAY_TASK_ID": "3"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)
        assert (folder / "spool/started").read_text().count("torch.distributed.run") == nodes, line
        assert "config.yaml" in (folder / "spool/started").read_text(), line


def asked(line: str) -> list[str] | None:
    """Arguments of `moe2dense` that print what a line resolves to, the quickstart's YAML or one for GPUs in place of the reader's own;
    None for a line that configures nothing."""
    words = shlex.split(line, comments=True)
    start = words.index("megatron_moe2dense" if words[0] == "torchrun" else "moe2dense") + 1
    name, arguments = words[start], words[start + 1 :]
    if name.startswith("-") or "--help" in arguments or name not in cli.COMMANDS:
        return None
    named = [argument for argument in arguments if argument.endswith(".yaml") and "=" not in argument]
    given = YAMLS / f"{name}.yaml" if (YAMLS / f"{name}.yaml").exists() else GPU_RUN
    if named and not (ROOT / named[0]).exists() and not cli.COMMANDS[name].positional:
        arguments[arguments.index(named[0])] = os.fspath(given)
    return [name, *(argument for argument in arguments if argument != "--dry-run"), "--print-config"]


def test_commands_resolve_to_a_configuration(capsys: pytest.CaptureFixture[str]):
    wrong = []
    for line, arguments in ((line, asked(line)) for line in RESOLVED):
        if arguments is not None:
            with contextlib.suppress(SystemExit):
                cli.main(arguments)
            printed = capsys.readouterr()
            if printed.err or not printed.out:
                wrong.append(f"{line}\n{printed.err}")
    assert not wrong, "\n".join(wrong)
