"""What a user sees of a command before and beside its work: help, errors, cost, and the output of a Slurm job."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_moe2dense import cli
from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.compute.device import chosen_dtype
from megatron_moe2dense.evals import evaluate
from tests.cases.shell import ROOT


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_user_asks_for_help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`moe2dense COMMAND --help`: a table as wide as the terminal, without names of classes or addresses of functions"""
    monkeypatch.setenv("COLUMNS", "110")
    main([command, "--help"])
    text = capsys.readouterr().out
    table = text[text.index("\nkey ") + 1 :].splitlines()
    narrow = max(len(line.split("  ")[0]) for line in table) + 2 * (24 + 2) + 42  # of a long key the meaning still has forty characters
    assert max(map(len, table)) <= max(110, narrow)
    assert not re.search(r"0x[0-9a-f]{6}|megatron_moe2dense\.|Annotated|\w+Config\b(?!\.)|typing", text.replace("GPTDatasetConfig", ""))


def test_a_user_misspells_a_key(capsys: pytest.CaptureFixture[str]):
    """an unknown key: the message names keys and the command's help, not a class"""
    with pytest.raises(SystemExit):
        main(["score", "statistics=s", "kepe=3"])
    said = capsys.readouterr().err
    assert "did you mean 'keep'" in said
    assert "the keys of the command" in said
    assert "ScoreConfig" not in said


def test_a_user_asks_what_a_run_costs(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`plan` of a distill.yaml: hours, GPU-hours and USD of this run at `hardware.price`, checkpoint sizes, a `parallel` block"""
    places = [f"student={example}/model", f"teacher={example}/model", "data.sequence_length=128", "hardware.gpus=2", "hardware.price=4"]
    main(["plan", *places, "train.tokens=10_000_000_000", "parallel={sequence: false, expert: 2}", f"report={tmp_path}/plan.json"])
    said, report = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    run, step = report["run"], report["layouts"][0]["step_seconds"]
    assert run["steps"] == 10_000_000_000 // (256 * 128)
    assert run["hours"] == pytest.approx(run["steps"] * step / 3600)
    assert run["gpu_hours"] == pytest.approx(2 * run["hours"])
    assert run["usd"] == pytest.approx(8 * run["hours"])
    assert f"{run['steps']:,} steps" in said
    assert "GPU-hours" in said
    block = re.search(r"^parallel: .*\nbatch: .*$", said, re.MULTILINE)
    assert block
    assert yaml.safe_load(block[0])["parallel"] == {"expert": 2}
    main(["plan", *places])
    assert "with train.tokens or train.steps also its hours" in capsys.readouterr().out


def test_a_user_dry_runs_a_distillation(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`distill --dry-run`: hours, GPU-hours and USD of this run in its layout on H100, as `plan` has them"""
    run = [
        f"student={example}/model",
        f"teacher={example}/model",
        "train={steps: 4}",
        "batch={micro: 2, global: 4}",
        "parallel={expert: 2}",
    ]
    data = f"data={{path: {example}/tokens/distill, sequence_length: 64}}"
    main(["distill", *run, data, f"output={tmp_path}/run", "--dry-run"])
    found = json.loads(capsys.readouterr().out)["on_h100"]
    main(["plan", *run, "data.sequence_length=64", "hardware.gpus=2", f"report={tmp_path}/plan.json"])
    assert found == json.loads((tmp_path / "plan.json").read_text())["run"]
    assert found["gpu_hours"] == pytest.approx(2 * found["hours"])


def test_a_user_evaluates_what_has_no_room(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    """`eval` of models larger than the memory: refused before one is loaded, with both sizes; nothing written"""
    monkeypatch.setattr(evaluate, "free_bytes", lambda _device: 1_000_000)
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("it was loaded"))
    data = f"perplexity.data={{path: {example}/tokens/heldout, sequence_length: 64, sequences: 4}}"
    with pytest.raises(SystemExit):
        main(["eval", f"models=[{example}/model]", f"output={tmp_path}/r.jsonl", data])
    assert "0.0 GB of weights, 0.0 GB free on cpu" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()


def test_a_user_leaves_the_type_of_eval_out(example: Path, tmp_path: Path):
    """`eval` without dtype: float32 on a CPU, bfloat16 on a GPU; the record says which"""
    assert [chosen_dtype(name, device) for name, device in (("auto", "cpu"), ("auto", "cuda"), ("float16", "cuda"))] == [
        *("float32", "bfloat16", "float16")
    ]
    data = f"perplexity.data={{path: {example}/tokens/heldout, sequence_length: 64, sequences: 4}}"
    main(["eval", f"models=[{example}/model]", f"output={tmp_path}/r.jsonl", data])
    [row] = records.read(tmp_path / "r.jsonl")
    assert (row["config"]["dtype"], row["settings"]["dtype"]) == ("auto", "float32")


@pytest.mark.slow
def test_a_user_submits_to_slurm(tmp_path: Path):
    """a Slurm job: all memory and cores of its nodes, and rank 0's lines in the job's own output, whichever node it is on"""
    for script in ("distill", "calibrate"):
        assert "\n#SBATCH --mem=0\n" in (ROOT / f"launch/{script}.slurm").read_text()
    (tmp_path / "bin").mkdir()
    stub = '#!/bin/bash\nprintf "%s\\n" "$@" > "$NOTES"\nsleep 2; echo "I step 1/9: loss 2.5" >> "$LOG_DIR/node_1.txt"; sleep 2\n'
    (tmp_path / "bin/srun").write_text(stub)
    (tmp_path / "bin/scontrol").write_text("#!/bin/bash\necho first; echo second\n")
    for name in ("srun", "scontrol"):
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96"}
    place = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG_DIR": str(tmp_path / "logs"), "NOTES": str(tmp_path / "notes")}
    done = subprocess.run(
        [ROOT / "launch/srun.sh", "distill", "c.yaml"], env={**os.environ, **job, **place}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"launch/srun.sh: output of each node and rank in {tmp_path}/logs", "I step 1/9: loss 2.5"]
    given = (tmp_path / "notes").read_text().splitlines()
    assert given[given.index("--cpus-per-task") + 1] == "96"
    assert given[given.index("--mem") + 1] == "0"
