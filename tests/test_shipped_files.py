"""What the repository ships beside its code: YAML files, commands and links in the documents, nothing of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe2dense import cli
from megatron_moe2dense.common import config as configs

ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted(file for folder in ("yaml_configs", "studies") for file in (ROOT / folder).rglob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/**/README.md"))]
DOCUMENTS = [file for file in DOCUMENTS if not {".venv", "out", "node_modules"} & set(file.relative_to(ROOT).parts)]
LARGEST_FILE = 10_000_000  # bytes
LARGEST_EXAMPLE = 16_000_000  # bytes

# Written in pieces so that this file passes its own test.
HOSTS = ["pypi" + ".org", "python" + "hosted", "download.pytorch" + ".org", "anaconda" + ".org", "npmjs" + ".org", "deb.debian" + ".org"]
MACHINE = re.compile(r"(?<![\w.$}>])/(?:" + "|".join(["work", "tmp", "root", "home", "Users"]) + r")/\w")


def _tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def _texts() -> list[tuple[Path, str]]:
    result = []
    for file in _tracked():
        try:
            result.append((file, file.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return result


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_there_are_configs_to_test():
    assert YAMLS


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_shipped_yaml_is_a_config_of_its_command(file: Path):
    first = file.read_text().splitlines()[0]
    command = re.fullmatch(r"# moe2dense ([a-z-]+)\b.*", first)
    assert command, f"{file}: the first line names the command, `# moe2dense COMMAND`"
    configs.load(cli._load(cli.COMMANDS[command[1]].config), file, [])


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_commands_in_the_documents_exist(file: Path):
    text = file.read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert target in _targets(), f"{file.name}: no `make {target}` in the Makefile"
    for command in re.findall(r"(?:^|`|\$ )moe2dense ([a-z][a-z-]*)", text, re.MULTILINE):
        assert command in cli.COMMANDS, f"{file.name}: no command `moe2dense {command}`"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links_in_the_documents_lead_somewhere(file: Path):
    for link in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
        if "://" not in link:
            assert (file.parent / link).exists(), f"{file.name}: {link} does not exist"


def test_no_file_names_a_package_registry_or_a_path_of_one_machine():
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file, text in _texts()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE.search(line) or any(host in line for host in HOSTS)
    ]
    assert not found, "\n".join(found)


def test_files_stay_small_enough_for_git():
    sizes = {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in _tracked()}
    assert not {name: size for name, size in sizes.items() if size > LARGEST_FILE}
    assert sum(size for name, size in sizes.items() if name.startswith("examples/")) < LARGEST_EXAMPLE


def test_every_make_target_sets_up_the_environment():
    makefile = (ROOT / "Makefile").read_text()
    for target in _targets():
        assert re.search(rf"^{target}: \.venv/\.installed-", makefile, re.MULTILINE), f"`make {target}` does not need .venv"


def test_scripts_can_be_started():
    scripts = [ROOT / ".ci/run", *sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "studies").rglob("*.sh"))]
    for script in scripts:
        assert script.stat().st_mode & 0o111, f"{script} is not executable"
        subprocess.run(["bash", "-n", script], check=True)


def test_the_method_in_the_documents_registers_and_scores():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/adding.md").read_text(), re.DOTALL)
    assert code
    use = (
        "from megatron_moe2dense.surgery.stats import LayerStats\n"
        "stats = LayerStats({'tokens': np.array(4.0), 'selected_norm_sum': np.array([2.0, 9.0, 0.0]), "
        "'selected_count': np.array([2.0, 3.0, 0.0])})\n"
        "built = scorers.build({'method': 'mean_norm', 'power': 2.0})\n"
        "selection = built.select(stats, 2)\n"
        "assert list(selection.experts_K) == [1, 0], selection\n"
        "assert list(selection.scores_E) == [1.0, 9.0, 0.0], selection\n"
    )
    result = subprocess.run([sys.executable, "-c", code[1] + use], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
