"""Which modes of refit go with a model: sequential mode reads off the residual stream what a dense FFN should give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.cli import main
from tests.families.every import tiny_checkpoint
from tests.helpers.tiny_models import write_tokens

# Behind the FFN: a factor; a norm, in its block or in the layer; a projection out of the size of the experts.
NOT_PLAIN: dict[str, dict[str, Any]] = {"granitemoe": {}, "axk1": {}, "kolibri1": {}, "nemotron_h": {"moe_latent_size": 32}}
# Where a dense FFN takes the place of the experts in their block, which get tokens without their windows.
IN_BLOCK = ("axk2",)


def given(model_type: str, folder: Path, **changed: Any) -> list[str]:
    """Arguments of a conversion with a refit."""
    moe, prefix = tiny_checkpoint(folder / "moe", model_type, **changed), write_tokens(folder / "text", 16 * 40, vocab=128)
    data = [f"data.path={prefix}", "data.sequence_length=16"]
    main(["calibrate", f"source={moe}", f"output={folder}/statistics", *data])
    return [f"source={moe}", f"statistics={folder}/statistics", *data, "refit.method=ridge"]


@pytest.mark.parametrize("model_type", NOT_PLAIN)
def test_sequential_mode_is_refused_where_more_than_a_sum_stands_behind_the_ffn(
    model_type: str, tmp_path: Path, user_error: Callable[..., str]
):
    arguments = given(model_type, tmp_path, **NOT_PLAIN[model_type])
    said = user_error("convert", *arguments, f"output={tmp_path}/dense")
    assert f"refit.mode=sequential for {model_type}" in said
    assert "use refit.mode=parallel" in said
    main(["convert", *arguments, "refit.mode=parallel", f"output={tmp_path}/dense"])
    _require_better(tmp_path / "dense")


@pytest.mark.parametrize("model_type", IN_BLOCK)
def test_sequential_mode_goes_with_experts_that_are_replaced_in_their_block(model_type: str, tmp_path: Path):
    main(["convert", *given(model_type, tmp_path), f"output={tmp_path}/dense"])
    _require_better(tmp_path / "dense")


def _require_better(dense: Path) -> None:
    layers = json.loads((dense / "refit.json").read_text())["layers"]
    assert layers
    assert all(layer["held_out"] < layer["before"] for layer in layers)


def test_auto_leaves_out_the_mode_that_does_not_go_with_the_model(tmp_path: Path):
    source, statistics, *_ = given("granitemoe", tmp_path)
    texts = [f"{name}={{path: {tmp_path}/text, sequence_length: 16, sequences: 20}}" for name in ("data", "refit_data")]
    grid = ["grid={score: [sf], group: [anchor], keep: [2]}", "halvings=0", "select=[]", "reconstruct={epochs: 1, lr: 1e-3}"]
    main(["auto", source, statistics, *texts, *grid, f"output={tmp_path}/auto"])
    [judged] = json.loads((tmp_path / "auto/auto.json").read_text())["rounds"]
    assert [row["model"].count("sequential") for row in judged["models"]] == [0] * len(judged["models"])
    assert any("reconstruct" in row["model"] for row in judged["models"])
