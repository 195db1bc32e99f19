"""Neurons chosen one by one: the greedy least squares against refits of every candidate, the plan, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery.neurons.ols import OrthogonalLeastSquares
from megatron_moe2dense.surgery.refit.normal import Sums, solve
from megatron_moe2dense.surgery.resume import Resume
from megatron_moe2dense.surgery.stats import CalibratedStats
from tests.helpers.tiny_models import tiny, write_tokens
from tests.surgery.conftest import SEQUENCE, calibration

pytestmark = pytest.mark.slow

WINDOWS, WIDTH = 12, 2 * 32  # tokens of the text; neurons of a dense FFN: top-2 experts of 32


def drawn(tokens: int, candidates: int, free: int) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    """Correlated regressors, constants behind them, outputs that all have a part in, and their normal equations."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    h_TC = torch.cat((normal(tokens, 5) @ normal(5, candidates) + normal(tokens, candidates), torch.ones(tokens, free)), dim=1)
    y_TD = h_TC @ normal(candidates + free, 3) + normal(tokens, 3)
    sums = Sums.zeros(candidates + free, 3, torch.device("cpu"))
    sums.add(h_TC, y_TD)
    return h_TC, y_TD, sums


def greedy(h_TC: torch.Tensor, y_TD: torch.Tensor, width: int, free: int) -> list[int]:
    """Every open candidate is tried with those chosen, in a least-squares fit of its own."""
    constants, chosen = list(range(h_TC.shape[1] - free, h_TC.shape[1])), []
    for _ in range(width):
        errors = {}
        for candidate in set(range(h_TC.shape[1] - free)) - set(chosen):
            x_TK = h_TC[:, [*chosen, candidate, *constants]]
            errors[candidate] = float((y_TD - x_TK @ torch.linalg.lstsq(x_TK, y_TD, driver="gelsd").solution).square().sum())
        chosen.append(min(errors, key=lambda candidate: errors[candidate]))
    return chosen


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("block", [1, 3, 16])
def test_each_neuron_is_the_one_that_takes_most_off_the_error(block: int, free: int):
    """The shortlist of a block holds all 16 candidates here, so blocks change nothing."""
    h_TC, y_TD, sums = drawn(60, 16, free)
    method = OrthogonalLeastSquares(block=block, ridge=1e-13)
    assert method.choose(sums, 8, free).tolist() == greedy(h_TC, y_TD, 8, free)


def test_blocks_from_a_short_list_read_out_nearly_as_much():
    _, _, sums = drawn(2000, 200, 0)
    left = []
    for block in (1, 4):
        chosen = OrthogonalLeastSquares(block=block).choose(sums, 24, 0)
        part = Sums(sums.gram_FF[chosen][:, chosen], sums.cross_FD[chosen], sums.square, sums.tokens)
        left.append(part.error(solve(part, 1e-6).solution_FD))
    assert left[0] < left[1] * 1.02 < 1.1 * left[0]


def test_copies_and_silent_neurons_come_last_in_the_order_of_the_ranking():
    h_TC, y_TD, _ = drawn(60, 6, 0)
    sums = Sums.zeros(9, 3, torch.device("cpu"))
    sums.add(torch.cat((h_TC[:, :3], h_TC[:, :1], torch.zeros(60, 2), h_TC[:, 3:]), dim=1), y_TD)
    found = OrthogonalLeastSquares(ridge=1e-15).choose(sums, 9, 0).tolist()
    assert sorted(found) == list(range(9))
    assert found[-2:] == [4, 5]
    assert {0, 3} & set(found[6:]), "of two copies one is chosen"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("text") / "tokens", SEQUENCE * WINDOWS, 256, seed=3)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v2", "gpt_oss"])
def family(request: pytest.FixtureRequest, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny MoE and its statistics."""
    root = tmp_path_factory.mktemp(request.param)
    moe = tiny(request.param, root / "moe")
    main(["calibrate", *calibration(moe, text, root / "stats")])
    return moe, root / "stats"


def selected(family: tuple[Path, Path], text: str, output: Path, *options: str) -> dict[str, Any]:
    data = [f"data.path={text}", f"data.sequence_length={SEQUENCE}"]
    main(["select", f"source={family[0]}", f"statistics={family[1]}", f"output={output}", *data, *options])
    return json.loads((output / "plan.json").read_text())


def test_neurons_of_whole_experts_are_pure_pruning(family: tuple[Path, Path], tmp_path: Path):
    moe, stats = family
    main(["convert", f"source={moe}", f"statistics={stats}", f"output={tmp_path / 'experts'}"])
    plan = json.loads((tmp_path / "experts/plan.json").read_text())
    for layer in plan["layers"]:
        experts, scale = layer.pop("experts"), layer.pop("scales")[0]
        layer |= {"experts": np.repeat(experts, 32).tolist(), "neurons": list(range(32)) * 2, "scale": scale}
        for name in ("group_of", "merge_weights", "align"):
            del layer[name]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    main(["convert", f"source={moe}", f"plan={tmp_path / 'plan.json'}", f"output={tmp_path / 'neurons'}"])
    experts, neurons = (load_file(tmp_path / name / "model.safetensors") for name in ("experts", "neurons"))
    assert experts.keys() == neurons.keys()
    assert all(torch.equal(experts[name], neurons[name]) for name in experts)


def test_energy_ranks_by_what_calibration_summed_and_the_down_columns(family: tuple[Path, Path], tmp_path: Path):
    moe, stats = family
    main(["select", f"source={moe}", f"statistics={stats}", f"output={tmp_path / 'out'}", "select.method=energy"])
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["select"] == {"method": "energy"}
    tensors = load_file(moe / "model.safetensors")
    for layer in plan["layers"]:
        energy_EI = CalibratedStats.open(stats).layers[layer["layer"]]["neuron_energy"]
        stem = f"model.layers.{layer['layer']}.mlp.experts."
        packed = tensors.get(f"{stem}down_proj")  # GPT-OSS: [E, I, D]
        for expert in range(len(energy_EI)):
            down_ID = tensors[f"{stem}{expert}.down_proj.weight"].T if packed is None else packed[expert]
            energy_EI[expert] *= down_ID.double().square().sum(1).numpy()
        best = np.argsort(-energy_EI.ravel(), kind="stable")[:WIDTH]
        assert [(e, i) for e, i in zip(layer["experts"], layer["neurons"], strict=True)] == [divmod(int(place), 32) for place in best]


def test_chosen_neurons_read_the_output_out_better_than_the_papers_experts(family: tuple[Path, Path], text: str, tmp_path: Path):
    """Held-out error of the refit on the same text, in every layer."""
    selected(family, text, tmp_path / "ols")
    refit = ["refit.method=ridge", "refit.mode=parallel", f"data.path={text}", f"data.sequence_length={SEQUENCE}"]
    main(["convert", f"source={family[0]}", f"plan={tmp_path / 'ols/plan.json'}", f"output={tmp_path / 'neurons'}", *refit])
    main(["convert", f"source={family[0]}", f"statistics={family[1]}", f"output={tmp_path / 'experts'}", *refit])
    neurons, experts = (json.loads((tmp_path / name / "refit.json").read_text())["layers"] for name in ("neurons", "experts"))
    assert all(ours["train"] < theirs["train"] for ours, theirs in zip(neurons, experts, strict=True))


def test_a_killed_selection_goes_on_and_gives_the_same_plan(
    moe: Path, statistics: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family = moe, statistics
    straight, finish_layer = selected(family, text, tmp_path / "straight"), Resume.finish_layer

    def interrupted(self: Resume, done: int, *rest: Any) -> None:
        finish_layer(self, done, *rest)
        if done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Resume, "finish_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        selected(family, text, tmp_path / "killed")
    monkeypatch.undo()
    assert selected(family, text, tmp_path / "killed") == straight
    assert [path.name for path in sorted((tmp_path / "killed").iterdir())] == ["moe2dense.json", "plan.json"]


def test_what_does_not_fit_is_refused(moe: Path, statistics: Path, tokens: str, tmp_path: Path, user_error: Callable[..., str]):
    given = [f"source={moe}", f"statistics={statistics}", f"output={tmp_path / 'out'}"]
    text = [f"data.path={tokens}", f"data.sequence_length={SEQUENCE}"]
    assert "select.method=ols needs text" in user_error("select", *given)
    assert "data has no effect" in user_error("select", *given, *text, "select.method=energy")
    assert "groups=9" in user_error("select", *given, "select.method=energy", "groups=9")
    main(["calibrate", *calibration(moe, tokens, tmp_path / "few"), "statistics=[gate_sum]"])
    assert "without neuron_energy" in user_error("select", given[0], f"statistics={tmp_path / 'few'}", given[2], "select.method=energy")
    main(["select", *given, "select.method=energy"])
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    changes = {"neuron twice": [99] * WIDTH, "neurons the source does not have": list(range(WIDTH))}
    for said, neurons in changes.items():
        layers = [{**layer, "experts": [0] * WIDTH, "neurons": neurons} for layer in plan["layers"]]
        (tmp_path / "plan.json").write_text(json.dumps({**plan, "layers": layers}))
        assert said in user_error("convert", given[0], f"plan={tmp_path / 'plan.json'}", f"output={tmp_path / 'dense'}")


def test_a_dry_run_counts_and_writes_nothing(moe: Path, statistics: Path, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = [f"data.path={tokens}", f"data.sequence_length={SEQUENCE}"]
    main(["select", f"source={moe}", f"statistics={statistics}", f"output={tmp_path / 'out'}", *text, "--dry-run"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["neurons"] == {"of a layer": 256, "candidates": 256, "chosen": WIDTH}
    assert facts["flops of a layer's sums"] == 2 * 640 * 256 * (256 + 3 * 64)
    assert not (tmp_path / "out").exists()
