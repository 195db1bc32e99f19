"""Every command on a quantised source does what it does on the same model dequantised by the library that quantised it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, windows
from tests.helpers.compressed import as_int4, from_int4
from tests.helpers.quantised import as_fp8, from_fp8

pytestmark = pytest.mark.slow
LENGTH, SEQUENCES = 64, 8


@pytest.fixture(scope="module")
def pairs(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By scheme: the pico MoE quantised, and dequantised again by the library."""
    root = tmp_path_factory.mktemp("quantised")
    fp8 = as_fp8(example / "model", root / "fp8", (32, 32))
    int4 = as_int4(example / "model", root / "int4")
    return {"fp8": (fp8, from_fp8(fp8, root / "of_fp8")), "int4": (int4, from_int4(int4, root / "of_int4"))}


@pytest.fixture(scope="module", params=["fp8", "int4"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, tuple[Path, Path]]) -> tuple[Path, Path]:
    return pairs[request.param]


def data(example: Path, name: str = "data", text: str = "distill") -> list[str]:
    return [f"{name}.path={example / 'tokens' / text}", f"{name}.sequence_length={LENGTH}", f"{name}.sequences={SEQUENCES}"]


def dense_of(source: Path, example: Path, root: Path) -> Path:
    main(["calibrate", f"source={source}", f"output={root / 'stats'}", *data(example)])
    main(["convert", f"source={source}", f"statistics={root / 'stats'}", f"output={root / 'dense'}"])
    return root / "dense"


def test_calibrate_and_convert_give_the_dense_model_of_the_dequantised_weights(pair: tuple[Path, Path], example: Path, tmp_path: Path):
    found, wanted = (dense_of(source, example, tmp_path / source.name) for source in pair)
    mine, its = (load_file(dense / "model.safetensors") for dense in (found, wanted))
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) and mine[name].dtype == torch.bfloat16 for name in its)
    config = json.loads((found / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def nll_of(source: Path, example: Path, output: Path) -> float:
    main(["eval", f"models={{m: {source}}}", f"output={output}", *data(example, "perplexity.data", "heldout"), "device=cpu"])
    return json.loads(output.read_text())["metrics"]["nll"]


def test_eval_gives_the_nll_of_the_dequantised_weights(pair: tuple[Path, Path], example: Path, tmp_path: Path):
    assert len({nll_of(source, example, tmp_path / f"{source.name}.jsonl") for source in pair}) == 1


def test_eval_of_fp8_gives_the_nll_of_transformers_own_run(pairs: dict[str, tuple[Path, Path]], example: Path, tmp_path: Path):
    source = pairs["fp8"][0]
    config = TokensConfig(path=str(example / "tokens/heldout"), sequence_length=LENGTH, sequences=SEQUENCES)
    tokens_NS = torch.from_numpy(windows(config, Limits(2048, 1024)))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()  # without a GPU it dequantises as it loads
    with torch.no_grad():
        wanted = float(model(input_ids=tokens_NS, labels=tokens_NS).loss)
    assert nll_of(source, example, tmp_path / "records.jsonl") == pytest.approx(wanted, abs=1e-3)


def test_select_and_refit_read_it_too(pair: tuple[Path, Path], example: Path, tmp_path: Path):
    found = []
    for source in pair:
        root = tmp_path / source.name
        main(["calibrate", f"source={source}", f"output={root / 'stats'}", *data(example)])
        main(["select", f"source={source}", f"statistics={root / 'stats'}", f"output={root / 'plan'}", *data(example)])
        main(["convert", f"source={source}", f"plan={root / 'plan/plan.json'}", f"output={root / 'dense'}", "refit={}", *data(example)])
        found.append(load_file(root / "dense/model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_sweep_judges_the_same(pair: tuple[Path, Path], example: Path, tmp_path: Path):
    rows: list[Any] = []
    grid = ["grid.keep=[4]", "grid.score=[{method: sf}]", "grid.group=[{method: round_robin}]", "grid.scale=[{method: uniform}]"]
    for source in pair:
        output, stats = tmp_path / source.name, tmp_path / f"stats of {source.name}"
        main(["calibrate", f"source={source}", f"output={stats}", *data(example)])
        main(["sweep", f"source={source}", f"statistics={stats}", f"output={output}", *grid, *data(example, text="heldout")])
        rows.append([json.loads(line)["metrics"] for line in (output / "records.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1]
    assert rows[0]


def test_a_quantised_teacher_and_a_quantised_student_train(pairs: dict[str, tuple[Path, Path]], example: Path, tmp_path: Path):
    """The losses are those of the dequantised weights, and the export is plain bfloat16."""
    dense = dense_of(pairs["fp8"][0], example, tmp_path)
    student = as_fp8(dense, tmp_path / "student", (32, 32))
    students, losses = (student, from_fp8(student, tmp_path / "of_student")), []
    for scheme in ("fp8", "int4"):
        for student, teacher in zip(students, pairs[scheme], strict=True):
            output = tmp_path / f"run of {teacher.name}"
            run = [f"student={student}", f"teacher={teacher}", f"output={output}", *data(example)[:2], "batch.micro=2", "batch.global=4"]
            main(["distill", *run, "train.steps=2", "teacher_check.loss_bound=null"])
            losses.append([json.loads(line).get("loss") for line in (output / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] != losses[2] == losses[3]
    run[1], run[2] = f"teacher={pairs['fp8'][0]}", f"output={tmp_path / 'run in fp8'}"
    run[0] = f"student={students[0]}"
    main(["distill", *run, "train.steps=2", "teacher.check.loss_bound=null", "teacher.dtype=fp8"])
    in_fp8 = [json.loads(line).get("loss") for line in (tmp_path / "run in fp8/metrics.jsonl").read_text().splitlines()]
    assert in_fp8 == losses[0]  # and so to the bit when it stays FP8 in memory
    main(["export", f"checkpoint={tmp_path / 'run of fp8'}", f"output={tmp_path / 'export'}"])
    assert {tensor.dtype for tensor in load_file(tmp_path / "export/model.safetensors").values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())


def test_inspect_counts_the_same_parameters_and_fewer_bytes(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    facts: list[Any] = []
    for source in pair:
        main(["inspect", str(source), "--json"])
        facts.append(json.loads(capsys.readouterr().out))
    for name in ("parameters", "active_parameters", "dense", "left_out"):
        assert facts[0][name] == facts[1][name]
    assert facts[0]["bytes"]["experts"] < 0.52 * facts[1]["bytes"]["experts"]


def test_prune_dense_cuts_the_dequantised_weights(pairs: dict[str, tuple[Path, Path]], example: Path, tmp_path: Path):
    packed = as_fp8(dense_of(pairs["fp8"][0], example, tmp_path), tmp_path / "packed", (32, 32))
    found = []
    for source in (packed, from_fp8(packed, tmp_path / "plain")):
        output = tmp_path / f"pruned {source.name}"
        main(["prune-dense", f"source={source}", f"output={output}", "target.intermediate_size=96", *data(example)])
        assert "quantization_config" not in json.loads((output / "config.json").read_text())
        found.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
