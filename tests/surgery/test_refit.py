"""The refitted down projections against least squares on materialised activations of stock transformers models, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery.refit.layer import LayerFit, LayerSums
from megatron_moe2dense.surgery.refit.normal import Sums, best_ridge, solve
from megatron_moe2dense.tokens.indexed import TokenFile
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny, write_tokens
from tests.surgery.conftest import SEQUENCE, calibration

pytestmark = pytest.mark.slow

RIDGE, WINDOWS = 1e-3, 12
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v2": {"intermediate_size": 160},  # wider than the dense FFNs, which are padded
    "gpt_oss": {"swiglu_limit": 0.3},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("text") / "tokens", SEQUENCE * WINDOWS, 256, seed=3)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny MoE, its statistics, and the dense model of the same plan without a refit."""
    root = tmp_path_factory.mktemp(request.param)
    moe = tiny(request.param, root / "moe", **FAMILIES[request.param])
    main(["calibrate", *calibration(moe, text, root / "stats")])
    main(["convert", f"source={moe}", f"statistics={root / 'stats'}", f"output={root / 'plain'}"])
    return moe, root / "stats", root / "plain"


@pytest.fixture(scope="module")
def small(moe: Path, statistics: Path) -> tuple[Path, Path, Path]:
    """The bfloat16 MoE of all tests of the surgery and its statistics; no dense model."""
    return moe, statistics, moe


def refitted(family: tuple[Path, Path, Path], text: str, output: Path, *options: str) -> dict[str, torch.Tensor]:
    data = [f"data.path={text}", f"data.sequence_length={SEQUENCE}", "refit.dtype=float64"]
    main(["convert", f"source={family[0]}", f"statistics={family[1]}", f"output={output}", "refit.method=ridge", *data, *options])
    return load_file(output / "model.safetensors")


class Stock:
    """A stock model in float64, with what its layers saw in the last run: residual streams and inputs of their MLPs."""

    def __init__(self, directory: Path):
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager").eval()
        self.layers = self.model.model.layers
        self.after: dict[int, torch.Tensor] = {}
        self.mlp_in: dict[int, torch.Tensor] = {}
        self.mlp_out: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda _m, _i, output, number=number: self.after.update({number: output}))
            layer.mlp.register_forward_hook(lambda _m, inputs, output, number=number: self._note(number, inputs[0], output))

    def _note(self, number: int, x: torch.Tensor, output: Any) -> None:
        self.mlp_in[number], self.mlp_out[number] = x, output[0] if isinstance(output, tuple) else output

    def run(self, text: str) -> None:
        tokens = torch.from_numpy(TokenFile.open(text).tokens[: SEQUENCE * WINDOWS].astype("int64")).view(WINDOWS, SEQUENCE)
        with torch.no_grad():
            self.model(input_ids=tokens)

    def neurons(self, number: int, x_TD: torch.Tensor) -> torch.Tensor:
        """What the down projection of a dense layer gets, written out."""
        mlp = self.layers[number].mlp
        if not hasattr(mlp, "experts"):
            return mlp.act_fn(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
        gate, up = (x_TD @ mlp.experts.gate_up_proj[0] + mlp.experts.gate_up_proj_bias[0]).view(len(x_TD), -1, 2).unbind(-1)
        gate, up = gate.clamp(max=0.3), up.clamp(-0.3, 0.3)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def down(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The down projection [F, D] and bias, views to write to."""
        mlp = self.layers[number].mlp
        if not hasattr(mlp, "experts"):
            return mlp.down_proj.weight.data.T, None
        return mlp.experts.down_proj.data[0], mlp.experts.down_proj_bias.data[0]


def least_squares(x_TF: torch.Tensor, y_TD: torch.Tensor, bias: bool) -> torch.Tensor:
    """torch.linalg.lstsq on rows of tokens, with the ridge as further rows."""
    rows_FF = torch.eye(x_TF.shape[1], dtype=torch.float64) * (RIDGE * x_TF.square().sum(0).mean()).sqrt()
    if bias:
        x_TF = torch.cat((x_TF, torch.ones(len(x_TF), 1, dtype=torch.float64)), dim=1)
        rows_FF = torch.nn.functional.pad(rows_FF, (0, 1))
    zeros_FD = y_TD.new_zeros(len(rows_FF), y_TD.shape[1])
    return torch.linalg.lstsq(torch.cat((x_TF, rows_FF)), torch.cat((y_TD, zeros_FD)), driver="gelsd").solution


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_down_projections_are_the_least_squares_solution(mode: str, family: tuple[Path, Path, Path], text: str, tmp_path: Path):
    assert_least_squares(mode, "fixed", family, text, tmp_path)
    if "deepseek" in str(family[0]):  # the others have no shared experts
        assert_least_squares(mode, "refitted", family, text, tmp_path)


def assert_least_squares(mode: str, shared: str, family: tuple[Path, Path, Path], text: str, folder: Path) -> None:
    found = refitted(family, text, folder / shared, f"refit.mode={mode}", f"refit.ridge={RIDGE}", f"refit.shared={shared}")
    teacher, student = Stock(family[0]), Stock(family[2])
    teacher.run(text)
    config = json.loads((family[0] / "config.json").read_text())
    width = 128 if shared == "refitted" else 64  # K = G = 2 experts of 32, and the shared ones
    for number in range(config.get("first_k_dense_replace", 0), 4):
        student.run(text)
        if mode == "parallel":
            x_TD, y_TD = teacher.mlp_in[number].flatten(0, 1), teacher.mlp_out[number].flatten(0, 1)
        else:
            residual = student.after[number] - student.mlp_out[number]
            x_TD, y_TD = student.mlp_in[number].flatten(0, 1), (teacher.after[number] - residual).flatten(0, 1)
        with torch.no_grad():
            x_TF = student.neurons(number, x_TD)
        down_FD, bias_D = student.down(number)
        solution = least_squares(x_TF[:, :width], y_TD - x_TF[:, width:] @ down_FD[width:], bias_D is not None)
        down_FD[:width] = solution[:width].float().double()
        name = f"model.layers.{number}.mlp."
        if bias_D is None:
            assert_close(found[f"{name}down_proj.weight"].T, down_FD)
        else:
            bias_D[:] = solution[width].float().double()
            assert_close(found[f"{name}experts.down_proj"][0], down_FD)
            assert_close(found[f"{name}experts.down_proj_bias"][0], bias_D)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.linalg.vector_norm(found.double() - expected) <= 1e-6 * torch.linalg.vector_norm(expected)


def test_nothing_but_the_down_projections_changes_and_the_report_is_beside_them(family: tuple[Path, Path, Path], text: str, tmp_path: Path):
    found, plain = refitted(family, text, tmp_path / "dense"), load_file(family[2] / "model.safetensors")
    assert found.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(found[name], plain[name])}
    assert changed
    assert all("mlp" in name and "down_proj" in name for name in changed)
    report = json.loads((tmp_path / "dense/refit.json").read_text())["layers"]
    assert [row["layer"] for row in report] == [row["layer"] for row in json.loads((tmp_path / "dense/plan.json").read_text())["layers"]]
    assert all(row["train"] <= row["before"] for row in report)
    assert not (tmp_path / "dense/refit").exists()


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_batches_do_not_matter_and_a_plan_gives_the_same_bytes(mode: str, small: tuple[Path, Path, Path], text: str, tmp_path: Path):
    once = refitted(small, text, tmp_path / "once", f"refit.mode={mode}", f"refit.batch_tokens={SEQUENCE * 64}")
    often = refitted(small, text, tmp_path / "often", f"refit.mode={mode}", f"refit.batch_tokens={SEQUENCE * 5}")
    for name, tensor in once.items():  # bfloat16: the last bit may round the other way
        assert torch.linalg.vector_norm(tensor.double() - often[name].double()) <= 1e-3 * torch.linalg.vector_norm(tensor.double())
    assert (tmp_path / "once/plan.json").read_text() != (tmp_path / "often/plan.json").read_text()
    main(["convert", f"source={small[0]}", f"plan={tmp_path / 'once/plan.json'}", f"output={tmp_path / 'again'}"])
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "once/model.safetensors").read_bytes()


@pytest.mark.distributed
def test_two_ranks_with_half_the_text_each_give_the_solution_of_one(text: str, tmp_path: Path):
    moe = tiny("gpt_oss", tmp_path / "moe")
    main(["calibrate", *calibration(moe, text, tmp_path / "stats")])
    given = [f"source={moe}", f"statistics={tmp_path / 'stats'}", "refit.method=ridge", f"refit.batch_tokens={SEQUENCE * 2}"]
    given += [f"data.path={text}", f"data.sequence_length={SEQUENCE}", "refit.dtype=float64"]
    launch(2, "tests.surgery.cases:convert_on_two_ranks", given, str(tmp_path))
    for mode in ("parallel", "sequential"):
        main(["convert", *given, f"refit.mode={mode}", f"output={tmp_path / mode}"])
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in (mode, f"{mode} by two"))
        for name, tensor in one.items():
            assert_close(two[name], tensor.double())
        reports = [json.loads((tmp_path / name / "refit.json").read_text())["layers"] for name in (mode, f"{mode} by two")]
        assert [row["held_out"] for row in reports[0]] == pytest.approx([row["held_out"] for row in reports[1]], rel=1e-9)


def test_a_refit_on_its_own_text_brings_the_logits_nearer_to_the_teachers(family: tuple[Path, Path, Path], text: str, tmp_path: Path):
    errors = {}
    for mode in ("parallel", "sequential"):
        refitted(family, text, tmp_path / mode, f"refit.mode={mode}", "refit.ridge=1e-4")
    tokens = torch.from_numpy(TokenFile.open(text).tokens[: SEQUENCE * WINDOWS].astype("int64")).view(WINDOWS, SEQUENCE)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(family[0], dtype=torch.float32)(tokens).logits
        for name, directory in (("plain", family[2]), ("parallel", tmp_path / "parallel"), ("sequential", tmp_path / "sequential")):
            errors[name] = float((AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens).logits - expected).norm())
    assert errors["sequential"] < errors["parallel"] < errors["plain"]


def test_the_ridge_comes_from_held_out_text():
    """Few noisy tokens for many neurons: the best of the ridges is one that an exhaustive look on fresh text also prefers."""
    generator = np.random.default_rng(0)
    truth_FD = torch.from_numpy(generator.normal(size=(60, 4)))

    def drawn(tokens: int) -> Sums:
        x_TF = torch.from_numpy(generator.normal(size=(tokens, 60)))
        sums = Sums.zeros(60, 4, torch.device("cpu"))
        sums.add(x_TF, x_TF @ truth_FD + torch.from_numpy(8 * generator.normal(size=(tokens, 4))))
        return sums

    train, judge, fresh = drawn(80), drawn(4000), drawn(50_000)
    ridges = [10.0**power for power in range(-7, 1)]
    chosen = best_ridge(train, judge, ridges)
    errors = {ridge: fresh.error(solve(train, ridge).solution_FD) for ridge in ridges}
    assert chosen == min(errors, key=errors.__getitem__)
    assert chosen > 1e-7


def test_an_ill_conditioned_problem_is_solved_with_a_larger_ridge():
    x_TF = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_TF[:, 5], x_TF[:, 4] = x_TF[:, 0], 0.0  # a copy, and one that is never active
    sums = Sums.zeros(6, 2, torch.device("cpu"))
    sums.add(x_TF, x_TF[:, :2])
    found = solve(sums, 0.0)
    assert 0 < found.ridge < 1e-10
    assert sums.error(found.solution_FD) < 1e-10
    assert (found.solution_FD[4] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["refit.method=ridge"], "refit needs text"),
        (["data.path=TEXT"], "data has no effect without refit"),
        (["refit.method=ridge", "data.path=TEXT", "refit.ridge=-1.0"], "ridge must be 0 or more"),
        (
            ["refit.method=ridge", "data.path=TEXT", f"data.sequence_length={SEQUENCE}", "data.sequences=1"],
            "refit.ridge=auto with 1 window",
        ),
    ],
)
def test_a_refit_without_sense_is_refused(
    options: list[str], message: str, small: tuple[Path, Path, Path], text: str, user_error: Callable[..., str]
):
    given = [option.replace("TEXT", text) for option in options]
    assert message in user_error("convert", f"source={small[0]}", f"statistics={small[1]}", "output=nowhere", *given)


def test_a_plans_refit_is_refused_on_other_text_or_twice(
    small: tuple[Path, Path, Path], text: str, tokens: str, tmp_path: Path, user_error: Callable[..., str]
):
    refitted(small, text, tmp_path / "dense")
    again = ["convert", f"source={small[0]}", f"plan={tmp_path / 'dense/plan.json'}", f"output={tmp_path / 'again'}"]
    assert "other windows than those" in user_error(*again, f"data.path={tokens}", f"data.sequence_length={SEQUENCE}")
    assert "one of the two" in user_error(*again, "refit.method=ridge", f"data.path={text}")
    main(["convert", f"source={small[0]}", f"statistics={small[1]}", f"output={tmp_path / 'plain'}"])
    plain = ["convert", f"source={small[0]}", f"plan={tmp_path / 'plain/plan.json'}", f"output={tmp_path / 'again'}"]
    assert "data only for a refit" in user_error(*plain, f"data.path={text}")


def test_a_killed_refit_keeps_its_solved_layers(small: tuple[Path, Path, Path], text: str, tmp_path: Path, monkeypatch: Any):
    """Stopped in the third layer: the layers before are not fitted again, and the end is that of an uninterrupted run."""
    whole = refitted(small, text, tmp_path / "whole")
    fit, fitted = LayerSums.fit, []

    def until_the_third(self: LayerSums, layer: int, *arguments: Any) -> tuple[LayerFit, LayerFit]:
        fitted.append(layer)
        if len(fitted) == 3:
            raise KeyboardInterrupt
        return fit(self, layer, *arguments)

    monkeypatch.setattr(LayerSums, "fit", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        refitted(small, text, tmp_path / "dense")
    found = refitted(small, text, tmp_path / "dense")
    assert fitted == [0, 1, 2, 2, 3]
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_dry_run_says_what_the_refit_costs(small: tuple[Path, Path, Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [f"source={small[0]}", f"statistics={small[1]}", f"output={tmp_path / 'dense'}", f"data.path={text}", "refit.mode=parallel"]
    main(["convert", *arguments, f"data.sequence_length={SEQUENCE}", "refit.ridge=1e-3", "--dry-run"])
    cost = json.loads(capsys.readouterr().out)["refit"]
    assert cost["tokens"] == SEQUENCE * WINDOWS
    assert cost["flops of a layer's sums"] == 2 * SEQUENCE * WINDOWS * 64 * (64 + 64)  # F = 2 x 32, D = 64
    assert cost["memory_bytes"] == 5 * 8 * 64 * 128
    assert not (tmp_path / "dense.tmp").exists()
