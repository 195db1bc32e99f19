"""What the repository ships beside its code: YAML files, commands and links in the documents, nothing of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from megatron_moe2dense import cli
from megatron_moe2dense.common import config as configs
from megatron_moe2dense.common.errors import UserError

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


def test_every_shipped_yaml_is_a_config_of_its_command():
    assert YAMLS
    wrong = []
    for file in YAMLS:
        command = re.fullmatch(r"# moe2dense ([a-z-]+)\b.*", file.read_text().splitlines()[0])
        if command is None or command[1] not in cli.COMMANDS:
            wrong.append(f"{file}: the first line names the command, `# moe2dense COMMAND`")
            continue
        try:
            configs.load(cli._load(cli.COMMANDS[command[1]].config), file, [])
        except UserError as error:
            wrong.append(f"{file}: {error}")
    assert not wrong, "\n".join(wrong)


def test_commands_in_the_documents_exist():
    wrong = []
    for file in DOCUMENTS:
        text = file.read_text()
        targets = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE)
        wrong += [f"{file.name}: no `make {target}` in the Makefile" for target in targets if target not in _targets()]
        commands = re.findall(r"(?:^|`|\$ )moe2dense ([a-z][a-z-]*)", text, re.MULTILINE)
        wrong += [f"{file.name}: no command `moe2dense {command}`" for command in commands if command not in cli.COMMANDS]
    assert not wrong, "\n".join(wrong)


def _anchors(document: Path) -> set[str]:
    """GitHub's anchors of its headings: lower case, without punctuation, spaces as hyphens; a repeated one is numbered."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} +(.+)$", text, re.MULTILINE):
        found[re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")] += 1
    return {f"{name}-{number}" if number else name for name, times in found.items() for number in range(times)}


def _leads_nowhere(document: Path, anchor: str) -> bool:
    return not document.exists() or (bool(anchor) and anchor not in _anchors(document))


def test_links_in_the_documents_lead_to_files_and_headings():
    links = [(file, link) for file in DOCUMENTS for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text()) if "://" not in link]
    places = [(file, link, *link.partition("#")[::2]) for file, link in links]
    wrong = [f"{file.name}: {link}" for file, link, path, anchor in places if _leads_nowhere(file.parent / path if path else file, anchor)]
    assert not wrong, "\n".join(wrong)


def test_references_to_the_documents_lead_to_headings():
    """docs/method.md#statistics in code, scripts and YAML. A number of a section goes stale unseen."""
    wrong, followed = [], 0
    for file, text in _texts():
        for document, anchor in re.findall(r"\b(docs/\w+\.md)\b(?:#([\w-]+))?", text):
            followed += bool(anchor)
            if _leads_nowhere(ROOT / document, anchor):
                wrong.append(f"{file.relative_to(ROOT)}: {document}#{anchor}")
        wrong += [f"{file.relative_to(ROOT)}: {found}" for found in re.findall(r"\w+\.md sections? \d|sections? \d+ of \w+\.md", text)]
    assert followed > 20
    assert not wrong, "\n".join(wrong)


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
    without = {target for target in _targets() if not re.search(rf"^{target}: \.venv/\.installed-", makefile, re.MULTILINE)}
    assert without == {"python", "pythons"}, "one makes .venv, the other an environment for each interpreter"


def test_scripts_can_be_started():
    scripts = [ROOT / ".ci/run", *sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "studies").rglob("*.sh"))]
    assert not [script for script in scripts if not script.stat().st_mode & 0o111]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_the_methods_in_the_documents_register_and_score():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/adding.md").read_text(), re.DOTALL)
    assert code
    use = (
        "from megatron_moe2dense.surgery.stats import LayerStats\n"
        "stats = LayerStats({'tokens': np.array(4.0), 'selected_norm_sum': np.array([2.0, 9.0, 0.0]), "
        "'selected_count': np.array([2.0, 3.0, 0.0])})\n"
        "for block, scores in ({'method': 'mean_norm'}, [1.0, 3.0, 0.0]), ({'method': 'norm_power', 'power': 2.0}, [1.0, 9.0, 0.0]):\n"
        "    selection = scorers.build(block).select(stats, 2)\n"
        "    assert list(selection.experts_K) == [1, 0], selection\n"
        "    assert list(selection.scores_E) == scores, selection\n"
    )
    result = subprocess.run([sys.executable, "-c", code[1] + use], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
