"""README's walk-through on a copied pico model: each line as printed, but for sizes, and each file it reads made by a line before."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from tests.cases.shell import ROOT, on_path, texts

# What is smaller here: the model, which lies under the name of the large one, processes, and text.
SIZES = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "processes=8": "processes=2",
    "expert: 8": "expert: 2",
    "4_000_000_000": "4096",
    "{path: data/train,": "{path: data/train, sequence_length: 32, validation_sequences: 2,",
    "train: {": "batch: {global: 4}\ntrain: {",
    "validation_fraction=0.01": "validation_fraction=0.1",
    "data.path=data/train\n": "data.path=data/train data.sequence_length=32\n",
    "perplexity.data.path=data/train_validation": "perplexity.data.path=data/train_validation perplexity.data.sequence_length=32",
}


def blocks() -> list[str]:
    """The bash blocks of README's section: `init`, the walk-through, other starts."""
    section = (ROOT / "README.md").read_text().split("## On your model")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_user_types_the_lines_of_the_readme(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """the README's walk-through, line by line: every line runs and finds what it reads; the other starts find it too"""
    shutil.copytree(example / "model", tmp_path / "Qwen3-30B-A3B")
    texts(tmp_path / "texts", documents=40)
    _, lines, others = blocks()
    script = lines
    for printed, small in SIZES.items():
        assert printed in script, printed
        script = script.replace(printed, small)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=on_path(tmp_path / "bin"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = records.read(tmp_path / "records.jsonl")
    assert row["model"] == "student"
    assert row["metrics"]["kl"] > 0
    assert list((tmp_path / "figures").glob("*.png"))
    monkeypatch.chdir(tmp_path)
    commands = [re.sub(r"  #.*", "", line).split() for line in others.splitlines()]
    assert [command[1] for command in commands] == ["convert", "select", "auto", "prune-dense"]
    for command in commands[:3]:
        settings = [word.strip("'") for word in command[2:]]
        length = [f"{word.partition('.path=')[0]}.sequence_length=32" for word in settings if ".path=" in word]
        main([command[1], *settings, *length, "--dry-run"])
