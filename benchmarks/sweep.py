"""`moe2dense sweep` over 350 configurations of pico_moe against `convert` and `eval` 350 times. Both are measured on a sample, as commands
with their start, and extrapolated: two configurations one by one, every 16th distinct plan of the sweep. Prints `name value unit goal`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICO = ROOT / "examples/pico_moe"
GOAL = 20.0
KEEP = (4, 8, 12, 16, 32)
WINDOWS = "sequence_length: 256, sequences: 32"
SAMPLE = ({"keep": 4, "score": {"method": "do_acp"}}, {"keep": 16, "score": {"method": "sf"}, "group": {"method": "anchor"}})


def command(*arguments: str) -> float:
    """Seconds of one command, its start included."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_moe2dense", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start


def one_by_one(folder: Path, number: int) -> float:
    """Seconds of `convert` and `eval` of one configuration."""
    settings = [f"{name}={json.dumps(block)}" for name, block in SAMPLE[number].items()]
    dense = folder / f"dense{number}"
    spent = command("convert", f"source={PICO}/model", f"statistics={folder}/statistics", f"output={dense}", *settings)
    data = f"perplexity.data={{path: {PICO}/tokens/heldout, {WINDOWS}}}"
    return spent + command("eval", f"models=[{dense}]", f"output={dense}.jsonl", data, f"kl.teacher={PICO}/model")


def sweep(folder: Path) -> tuple[float, int, int]:
    """Seconds of the whole sweep, extrapolated from one slice; configurations, distinct plans."""
    spent = command(
        "sweep",
        f"source={PICO}/model",
        f"statistics={folder}/statistics",
        f"output={folder}/sweep",
        f"data={{path: {PICO}/tokens/heldout, {WINDOWS}}}",
        f"grid.keep={list(KEEP)}",
        "slice=1/16",
    )
    rows = [json.loads(line) for line in (folder / "sweep/records.jsonl").read_text().splitlines()]
    passes = [row["seconds"] for row in rows if "same_plan_as" not in row]
    facts = json.loads((folder / "sweep/moe2dense.json").read_text())
    fixed = spent - sum(passes)
    return fixed + facts["plans"] * sum(passes) / len(passes), facts["points"], facts["plans"]


def main() -> None:
    """Calibrate, then measure both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = f"data={{path: {PICO}/tokens/distill, {WINDOWS}}}"
        command("calibrate", f"source={PICO}/model", f"output={folder}/statistics", data)
        single = sum(one_by_one(folder, number) for number in range(len(SAMPLE))) / len(SAMPLE)
        seconds, configurations, plans = sweep(folder)
    print(f"sweep_{configurations}_configurations_{plans}_distinct_extrapolated {seconds:.0f} s -")
    print(f"convert_and_eval_one_configuration {single:.2f} s -")
    print(f"sweep_over_one_by_one_extrapolated {configurations * single / seconds:.1f} ratio {GOAL:.0f}")


if __name__ == "__main__":
    main()
