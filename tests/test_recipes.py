"""The recipes of the paper's main rows: what launch/reproduce_*.sh start, command by command, on tiny models with the published numbers of
experts; and that the layouts' arithmetic is that of `--dry-run` on the published sizes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense import cli
from megatron_moe2dense.common.config import load
from megatron_moe2dense.evals import evaluate
from megatron_moe2dense.evals.harness import Tasks
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.operations import dry_run
from megatron_moe2dense.trainer.config import DistillConfig
from tests.families import published
from tests.helpers.tiny_models import tiny, write_tokens

ROOT = Path(__file__).resolve().parents[1]
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_30b_a3b": ("qwen3_moe", {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 8}),
    "deepseek_v2_lite": ("deepseek_v2", {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 8}),
    "gpt_oss_20b": ("gpt_oss", {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 8}),
}
PUBLISHED = {
    "qwen3_30b_a3b": published.QWEN3_30B_A3B,
    "deepseek_v2_lite": published.DEEPSEEK_V2_LITE,
    "gpt_oss_20b": published.GPT_OSS_20B,
}
PARAMETERS = {"qwen3_30b_a3b": 3_340_449_792, "deepseek_v2_lite": 2_659_708_416, "gpt_oss_20b": 4_185_089_880}
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$COMMANDS"; printf '\\n' >> "$COMMANDS"
"""


def commands(recipe: str, folder: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """What the script of a recipe would start: `moe2dense` and the launcher are replaced by a script that writes its arguments down."""
    for name in ("moe2dense", "launcher"):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(RECORDER)
        (folder / "bin" / name).chmod(0o755)
    log = folder / "commands"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COMMANDS": str(log), "LAUNCHER": "launcher"}
    paths = {"SOURCE": str(folder / "moe"), "DENSE": str(folder / "dense"), "TEXT": str(folder / "text"), "OUT": str(folder / "out")}
    script = ROOT / f"launch/reproduce_{recipe}.sh"
    subprocess.run([script, *arguments], env=environment | paths | variables, cwd=folder, check=True)
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


def rows_of(recipe: str) -> set[str]:
    """Those of the table of the script."""
    [rows] = re.findall(r"ROWS=\$\{ROWS:-(.*)\}", (ROOT / f"launch/reproduce_{recipe}.sh").read_text())
    return set(rows.split())


@pytest.mark.parametrize("recipe", EXPERTS)
def test_every_row_is_calibrated_once_then_converted_distilled_exported_and_measured(recipe: str, tmp_path: Path):
    found = commands(recipe, tmp_path, "train.seed=3")
    names = [command[0] for command in found]
    assert names[:3] == ["data", "eval", "calibrate"]
    assert found[1][-1] == "--dry-run", "what eval needs is looked up first"
    del found[1], names[1]
    assert names.count("data") == names.count("calibrate") == 1
    rows = {Path(argument.partition("=")[2]).parent.name for command in found for argument in command if argument.startswith("output=")}
    assert rows - {"out"} == rows_of(recipe)
    for name in ("distill", "export", "eval"):
        assert names.count(name) == len(rows - {"out"}), name
    for command in found:
        assert ("train.seed=3" in command) == (command[0] == "distill")
        assert (ROOT / command[1]).is_file()
    d2d = [argument for command in found if "d2d" in " ".join(command) for argument in command if "teacher=" in argument]
    assert {argument.partition("=")[2] for argument in d2d} <= {str(tmp_path / "dense")}, "the baseline's teacher is the dense model"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EXPERTS)
def test_every_command_of_a_recipe_dry_runs_on_a_tiny_model(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    family, experts = EXPERTS[recipe]
    out = tmp_path / "out"
    shape = {"max_position_embeddings": 4096, "num_hidden_layers": 2, "num_key_value_heads": 4}
    tiny(family, tmp_path / "moe", dtype="bfloat16", **shape, **experts)
    tiny("qwen3", tmp_path / "dense", dtype="bfloat16", **shape)
    (out / "tokens.json").parent.mkdir()
    write_tokens(out / "tokens", 9 * 2048)
    write_tokens(out / "tokens_validation", 257 * 2048)
    found = commands(recipe, tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "load_tasks", lambda *_: Tasks(None, {}, {"hellaswag": 10_042}, ["hellaswag"]))  # no network
    monkeypatch.setattr(evaluate, "require_tokenizer", lambda _: None)  # the tiny models have none
    for command in found:
        name, output = command[0], next(Path(item.partition("=")[2]) for item in command if item.startswith("output="))
        if name == "data" or output.exists():
            continue  # data needs the model's own tokenizer; a control shares the dense model of the main row
        if name == "prune-dense":
            command += ["target={hidden_size: 32, num_hidden_layers: 1}", "data.sequence_length=64", "data.sequences=8", "device=cpu"]
        if name == "distill":  # the recipe's text is not here: as much as one step of two ranks reads
            command += ["train.tokens=null", "train.steps=1", "batch.global=8", "batch.micro=1"]
        cli.main([*command, "--dry-run"])
        config = json.loads(capsys.readouterr().out)["config"]
        assert config["output"] == str(output)
        if name == "convert":
            assert f"{config['score']['method']}_k{config['keep']}" == output.parent.name, "a row is named by its scoring and K"
            assert (config["group"] is None) == (config["keep"] == config["groups"])
        if name == "calibrate":
            cli.main([*command, "data.sequence_length=64", "data.sequences=8", "device=cpu"])
        elif name in ("convert", "prune-dense"):
            cli.main(command)
        elif name == "distill":
            (output / "checkpoints" / "step_00000001").mkdir(parents=True)
            (output / "checkpoints" / "step_00000001" / "files.json").write_text("{}")
            (output / "student").mkdir()
            shutil.copy(Path(config["student"]) / "config.json", output / "student")
        elif name == "export":
            shutil.copytree(Path(config["checkpoint"]).parent.parent / first_row(recipe) / "dense", output)
        capsys.readouterr()


def first_row(recipe: str) -> str:
    """The main row, whose dense model stands in for what training would export."""
    return {"qwen3_30b_a3b": "do_acp_k8", "deepseek_v2_lite": "do_acp_k6", "gpt_oss_20b": "do_acp_k4"}[recipe]


def test_a_recipe_that_is_started_again_does_only_what_is_missing(tmp_path: Path):
    out = tmp_path / "out"
    (out / "statistics").mkdir(parents=True)
    (out / "tokens.json").touch()
    (out / "sf_k4/run").mkdir(parents=True)
    (out / "sf_k4/dense").mkdir()
    (out / "sf_k4/run/moe2dense.json").write_text('{\n  "status": "unfinished"\n}')
    assert [command[0] for command in commands("gpt_oss_20b", tmp_path, ROWS="sf_k4")] == ["distill"], (
        "stopped again: nothing to export yet"
    )
    (out / "sf_k4/run/moe2dense.json").write_text('{\n  "status": "finished"\n}')
    assert [command[0] for command in commands("gpt_oss_20b", tmp_path, ROWS="sf_k4")] == ["export", "eval"]


@pytest.mark.parametrize("recipe", EXPERTS)
def test_the_memory_and_sizes_beside_a_layout_are_those_of_the_dry_run(recipe: str, tmp_path: Path):
    text = (ROOT / f"yaml_configs/{recipe}/distill.yaml").read_text()
    teacher = PUBLISHED[recipe]
    stock = Stock.of(teacher, recipe)
    dims = stock.dims
    student = published.dense_config(teacher, dims.active * dims.expert_width + dims.shared_width)
    for name, config in (("teacher", teacher), ("student", student)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = [f"{name}={tmp_path / name}" for name in ("teacher", "student")]
    facts = dry_run.facts(load(DistillConfig, ROOT / f"yaml_configs/{recipe}/distill.yaml", paths))
    memory = {name: value / 1e9 for name, value in facts["memory_bytes"].items()}
    assert f"{memory['student']:.1f} GB of student and {memory['teacher']:.1f} GB of teacher" in text
    assert f"{facts['flops']:.1e}".replace("e+", "e") in text
    # a GPU's share: experts over 8, the rest whole; the student's weights and gradients whole, its optimizer state over 8
    moe_layers = len(stock.moe)
    experts = 2 * moe_layers * dims.experts * 3 * dims.hidden_size * dims.expert_width / 1e9
    of_teacher = experts / 8 + memory["teacher"] - experts
    of_student = memory["student"] / 18 * (2 + 4 + 12 / 8)
    shares = [float(value) for value in re.findall(r"^#   \w+ .* ([\d.]+) GB$", text, re.MULTILINE)]
    together = re.search(r"^# together (\d+) GB", text, re.MULTILINE)
    assert together
    assert shares[:2] == [pytest.approx(of_teacher, abs=0.06), pytest.approx(of_student, abs=0.06)]
    assert float(together[1]) == pytest.approx(sum(shares), abs=0.5)
    assert sum(shares) < 60


@pytest.mark.parametrize("recipe", EXPERTS)
def test_the_script_says_what_the_method_expects(recipe: str):
    script, method = (ROOT / f"launch/reproduce_{recipe}.sh").read_text(), (ROOT / "docs/method.md").read_text()
    assert f"{PARAMETERS[recipe]:,}" in script
    assert f"{PARAMETERS[recipe]:,}" in method
