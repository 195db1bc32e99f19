"""Block-wise reconstruction against a stock transformers MLP trained by hand, and what must not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.families.ffn import Ffn
from megatron_moe2dense.surgery.config import ReconstructConfig
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.refit.layer import FitReport, LayerFit
from megatron_moe2dense.surgery.refit.reconstruct import LayerText, Reconstruction
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny, write_tokens
from tests.surgery.conftest import SEQUENCE, calibration

pytestmark = pytest.mark.slow

WINDOWS, LENGTH, HIDDEN, WIDTH = 20, 8, 6, 10
REPORT = FitReport(layer=0, ridge=1e-3, tokens=1, unknowns=1, before=1.0, train=0.5, held_out=0.6)
BARE = ["data.sequence_length=" + str(SEQUENCE), "refit.method=ridge"]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_text(place: HiddenPlace | None = None) -> LayerText:
    """Targets of another FFN than the one that is trained."""
    x_NSD, other = normal(WINDOWS, LENGTH, HIDDEN, seed=1), mlp(seed=2)
    kept = [HiddenStates((WINDOWS, LENGTH, HIDDEN), torch.float32, 3, place or HiddenPlace()) for _ in range(2)]
    if place is not None:
        kept[1] = HiddenStates((WINDOWS, LENGTH, HIDDEN), torch.float32, 3, HiddenPlace(place.directory, place.budget, "targets"))
    text = LayerText(kept[0], kept[1], torch.arange(WINDOWS) % 10 == 9)
    for batch in range(len(text.inputs)):
        x_BSD = x_NSD[batch * 3 : batch * 3 + 3]
        text.put(batch, x_BSD, other(x_BSD).detach())
    text.complete()
    return text


def mlp(seed: int) -> Qwen3MLP:
    stock = Qwen3MLP(Qwen3Config(hidden_size=HIDDEN, intermediate_size=WIDTH, hidden_act="silu"))
    for number, parameter in enumerate(stock.parameters()):
        parameter.data = 0.5 * normal(*parameter.shape, seed=10 * seed + number)
    return stock


def ffn_of(stock: Qwen3MLP) -> Ffn:
    return Ffn(*(layer.weight.detach().clone() for layer in (stock.gate_proj, stock.up_proj, stock.down_proj)))


def reconstruction(settings: ReconstructConfig, fixed: int = 0, ranks: Ranks = Ranks()) -> Reconstruction:  # noqa: B008 - frozen
    return Reconstruction(lambda gate, up: torch.nn.functional.silu(gate) * up, ffn_of(mlp(seed=3)), fixed, settings, ranks)


def test_it_is_adamw_on_a_stock_mlp():
    """All windows in every update: their order does not matter."""
    settings = ReconstructConfig(epochs=5, lr=2e-2, batch_tokens=WINDOWS * LENGTH)
    text, stock = layer_text(), mlp(seed=3)
    down = 0.5 * normal(HIDDEN, WIDTH, seed=4)
    found = reconstruction(settings).train(LayerFit({"down_DF": down}, REPORT), text, seed=0)
    assert found is not None

    stock.down_proj.weight.data = down.clone()
    x_NSD, y_NSD = (torch.cat(list(states)) for states in (text.inputs, text.targets))
    train = ~text.held_out_N
    adamw = torch.optim.AdamW(stock.parameters(), lr=2e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adamw, 2e-2, total_steps=6, pct_start=0.1, cycle_momentum=False)
    for _ in range(5):
        adamw.zero_grad()
        ((stock(x_NSD[train]) - y_NSD[train]).square().mean() / y_NSD.square().mean()).backward()
        adamw.step()
        schedule.step()
    for name, weight in vars(ffn_of(stock)).items():
        if weight is not None:
            torch.testing.assert_close(found.tensors[name], weight, rtol=1e-4, atol=1e-5)
    judged = (stock(x_NSD[~train]) - y_NSD[~train]).square().sum() / y_NSD[~train].square().sum()
    assert found.report.reconstructed == pytest.approx(judged.item(), rel=1e-4)
    assert found.report.epochs == 5


def test_passes_that_make_it_worse_are_not_kept():
    text = layer_text()
    fit = LayerFit({"down_DF": ffn_of(mlp(seed=3)).down_DF}, REPORT)
    found = reconstruction(ReconstructConfig(epochs=3, lr=1e3, batch_tokens=LENGTH)).train(fit, text, seed=0)
    assert found is None


def test_a_process_without_text_to_train_on_is_refused():
    text = layer_text()
    judging = LayerText(text.inputs, text.targets, torch.ones(WINDOWS, dtype=torch.bool))
    fit = LayerFit({"down_DF": ffn_of(mlp(seed=3)).down_DF}, REPORT)
    with pytest.raises(UserError, match="a process that has no window to train on"):
        reconstruction(ReconstructConfig()).train(fit, judging, seed=0)


def test_fixed_neurons_stay_and_the_rest_moves():
    before = ffn_of(mlp(seed=3))
    fit = LayerFit({"down_DF": before.down_DF}, REPORT)
    settings = ReconstructConfig(epochs=3, lr=1e-2, batch_tokens=LENGTH)
    trained = reconstruction(settings, fixed=4).train(fit, layer_text(), seed=0)
    assert trained is not None
    found = trained.applied(before)
    assert torch.equal(found.gate_FD[-4:], before.gate_FD[-4:])
    assert torch.equal(found.down_DF[:, -4:], before.down_DF[:, -4:])
    assert not torch.isclose(found.up_FD[:-4], before.up_FD[:-4]).any()


def test_text_in_files_is_the_same_text(tmp_path: Path):
    spilled, inside = layer_text(HiddenPlace(tmp_path, 0, "inputs")), layer_text()
    assert len(list(tmp_path.iterdir())) == 2
    chosen = torch.tensor([17, 2, 9])
    assert torch.equal(spilled.inputs.windows(chosen), inside.inputs.windows(chosen))
    assert torch.equal(spilled.targets.windows(chosen), inside.targets.windows(chosen))


@pytest.mark.distributed
def test_two_ranks_with_half_the_text_each_train_what_one_does():
    """Every window in every update."""
    settings = ReconstructConfig(epochs=4, lr=1e-2, batch_tokens=WINDOWS * LENGTH)
    fit = LayerFit({"down_DF": ffn_of(mlp(seed=3)).down_DF}, REPORT)
    expected = reconstruction(settings).train(fit, layer_text(), seed=0)
    assert expected is not None
    for tensors, error in launch(2, "tests.surgery.cases:reconstruct_half"):
        assert error == pytest.approx(expected.report.reconstructed, rel=1e-5)
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), [("qwen3_moe", "parallel"), ("deepseek_v2", "sequential"), ("gpt_oss", "parallel")])
def test_a_family_comes_nearer_to_its_teacher_layer_by_layer(family: str, mode: str, tmp_path: Path):
    """Shared experts are not touched; every other matrix of the FFNs is."""
    text, moe = write_tokens(tmp_path / "text", SEQUENCE * 160, seed=3), tiny(family, tmp_path / "moe")
    main(["calibrate", *calibration(moe, text, tmp_path / "stats")])
    given = [f"source={moe}", f"statistics={tmp_path / 'stats'}", f"data.path={text}", *BARE, f"refit.mode={mode}"]
    options = "refit.reconstruct={epochs: 3, lr: 1e-3, batch_tokens: 64}"
    main(["convert", *given, f"output={tmp_path / 'ridge'}"])
    main(["convert", *given, f"output={tmp_path / 'dense'}", options])
    rows = json.loads((tmp_path / "dense/refit.json").read_text())["layers"]
    assert all(row["reconstructed"] <= row["held_out"] for row in rows)
    assert any(row["reconstructed"] < row["held_out"] for row in rows)
    found, ridge = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "ridge"))
    changed = {name for name in found if not torch.equal(found[name], ridge[name])}
    assert {kind for kind in ("gate", "up", "down") if any(kind in name for name in changed)} == {"gate", "up", "down"}
    assert all("mlp" in name for name in changed)
    main(["convert", f"source={moe}", f"plan={tmp_path / 'dense/plan.json'}", f"output={tmp_path / 'again'}"])
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "dense/model.safetensors").read_bytes()


def test_without_a_window_to_judge_it_is_refused(moe: Path, statistics: Path, tokens: str, user_error: Callable[..., str]):
    given: list[Any] = [f"source={moe}", f"statistics={statistics}", "output=nowhere", f"data.path={tokens}", *BARE, "data.sequences=1"]
    assert "refit.reconstruct with 1 window" in user_error("convert", *given, "refit.ridge=1e-3", "refit.reconstruct={}")


def test_a_dry_run_says_what_it_costs(moe: Path, statistics: Path, tokens: str, capsys: pytest.CaptureFixture[str]):
    given = ["convert", f"source={moe}", f"statistics={statistics}", "output=nowhere", f"data.path={tokens}", *BARE, "--dry-run"]
    main([*given, "data.sequences=4", "refit.reconstruct={epochs: 5}"])
    cost = json.loads(capsys.readouterr().out)["refit"]
    assert cost["flops of a layer's reconstruction"] == 5 * 4 * SEQUENCE * 3 * 6 * 64 * 64  # F = 2 x 32, D = 64
