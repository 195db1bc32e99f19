"""Every command on a quantised source does what it does on the same model dequantised by the library that quantised it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.cli import main
from tests.helpers.quantised import as_fp8, from_fp8

LENGTH, SEQUENCES = 64, 8


@pytest.fixture(scope="module")
def pairs(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By scheme: the pico MoE quantised, and dequantised again by the library."""
    root = tmp_path_factory.mktemp("quantised")
    fp8 = as_fp8(example / "model", root / "fp8", (32, 32))
    return {"fp8": (fp8, from_fp8(fp8, root / "of_fp8"))}


@pytest.fixture(scope="module", params=["fp8"])
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


def test_eval_gives_the_nll_of_the_dequantised_weights(pair: tuple[Path, Path], example: Path, tmp_path: Path):
    rows = []
    for source in pair:
        output = tmp_path / f"{source.name}.jsonl"
        main(["eval", f"models={{m: {source}}}", f"output={output}", *data(example, "perplexity.data", "heldout")])
        rows.append(json.loads(output.read_text()))
    assert rows[0]["metrics"]["nll"] == rows[1]["metrics"]["nll"]


def test_inspect_counts_the_same_parameters_and_fewer_bytes(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    facts: list[Any] = []
    for source in pair:
        main(["inspect", str(source), "--json"])
        facts.append(json.loads(capsys.readouterr().out))
    for name in ("parameters", "active_parameters", "dense", "left_out"):
        assert facts[0][name] == facts[1][name]
    assert facts[0]["bytes"]["experts"] < 0.52 * facts[1]["bytes"]["experts"]
