"""Calibration: the sums against an independent float64 computation from the stock model, and how they add."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery.stats import STATISTICS, CalibratedStats
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, windows
from tests.families.every import tiny_checkpoint
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.surgery.conftest import SEQUENCE, calibration


@torch.no_grad()
def reference(path: Path, windows_BS: np.ndarray) -> list[dict[str, np.ndarray]]:
    """All statistics by plain loops over experts, from the inputs of the stock model's MoE blocks and the weights on disk."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    active, renormalise = model.config.num_experts_per_tok, model.config.norm_topk_prob
    inputs: list[torch.Tensor] = []

    def note(module: torch.nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs.append(arguments[0].flatten(0, 1))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(note)
    model(torch.from_numpy(windows_BS))
    weights = {name: tensor.double() for name, tensor in load_file(path / "model.safetensors").items()}
    result = []
    for i, x in enumerate(inputs):
        block = f"model.layers.{i}.mlp."
        p = torch.softmax(x @ weights[block + "gate.weight"].T, -1)
        selected = torch.zeros_like(p)
        for t in range(len(p)):
            selected[t, torch.argsort(p[t], descending=True)[:active]] = 1
        gate = p * selected
        if renormalise:
            gate = gate / gate.sum(1, keepdim=True)
        outputs, energies = [], []
        for e in range(p.shape[1]):
            w_gate, w_up, w_down = (weights[f"{block}experts.{e}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
            h = torch.nn.functional.silu(x @ w_gate.T) * (x @ w_up.T)
            outputs.append(h @ w_down.T)
            energies.append((gate[:, e, None] * h).square().sum(0))
        f = torch.stack(outputs)
        norms = f.norm(dim=-1).T
        sums = {
            "tokens": torch.tensor([float(len(p))]),
            "selected_count": selected.sum(0),
            "prob_sum": p.sum(0),
            "selected_prob_sum": (p * selected).sum(0),
            "gate_sum": gate.sum(0),
            "gated_norm_sum": (gate * norms).sum(0),
            "selected_norm_sum": (norms * selected).sum(0),
            "gram": torch.einsum("itd,jtd->ij", f, f),
            "output_sum": f.sum(1),
            "prob_gram": p.T @ p,
            "neuron_energy": torch.stack(energies),
        }
        result.append({name: value.numpy() for name, value in sums.items()})
    return result


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-6), ("float32", 1e-4)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_statistics_equal_an_independent_float64_computation(dtype: str, rtol: float, renormalise: bool, tokens: str, tmp_path: Path):
    path = tiny_qwen3_moe(tmp_path / "moe", norm_topk_prob=renormalise)
    main(["calibrate", *calibration(path, tokens, tmp_path / "stats"), f"dtype={dtype}", "batch_tokens=100"])
    found = CalibratedStats.open(tmp_path / "stats")
    expected = reference(path, windows(TokensConfig(path=tokens, sequence_length=SEQUENCE), Limits(256)))
    assert list(found.layers) == [0, 1, 2, 3]
    for stats, sums in zip(found.layers.values(), expected, strict=True):
        assert set(stats.sums) == set(STATISTICS)
        for name, row in STATISTICS.items():
            assert stats[name].dtype == np.float64
            assert stats[name].shape == row.shape(8, 64, 32) == sums[name].shape
            np.testing.assert_allclose(stats[name], sums[name], rtol=rtol, atol=rtol * np.abs(sums[name]).max(), err_msg=name)


def test_statistics_add_up_over_batches(moe: Path, statistics: Path, tokens: str, tmp_path: Path):
    stream = windows(TokensConfig(path=tokens, sequence_length=SEQUENCE), Limits(256))
    parts = []
    for number, part in enumerate((stream[:7], stream[7:])):
        prefix = write_tokens(tmp_path / f"part{number}", part.flatten(), 256)
        main(["calibrate", *calibration(moe, prefix, tmp_path / f"stats{number}"), f"batch_tokens={SEQUENCE}"])
        parts.append(CalibratedStats.open(tmp_path / f"stats{number}"))
    for layer, whole in CalibratedStats.open(statistics).layers.items():
        summed = parts[0].layers[layer] + parts[1].layers[layer]
        assert summed.tokens == whole.tokens == stream.size
        for name in STATISTICS:
            np.testing.assert_allclose(summed[name], whole[name], rtol=1e-5, atol=1e-5 * np.abs(whole[name]).max(), err_msg=name)


def test_a_list_of_statistics_gives_those_sums_and_the_token_count(moe: Path, statistics: Path, tokens: str, tmp_path: Path):
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats"), "statistics=[gate_sum, selected_norm_sum]"])
    some, every = CalibratedStats.open(tmp_path / "stats"), CalibratedStats.open(statistics)
    for layer, stats in some.layers.items():
        assert set(stats.sums) == {"tokens", "gate_sum", "selected_norm_sum"}
        for name, value in stats.sums.items():
            np.testing.assert_allclose(value, every.layers[layer][name], rtol=1e-5)


def test_the_manifest_tells_the_source_the_data_and_the_versions(moe: Path, statistics: Path):
    manifest = json.loads((statistics / "moe2dense.json").read_text())
    assert manifest["source"]["family"] == "qwen3_moe"
    assert manifest["data"] == {"sequences": 20, "sequence_length": SEQUENCE, "tokens": 20 * SEQUENCE}
    assert manifest["compute"]["dtype"] == "float32"
    assert {"torch", "transformers"} <= set(manifest["versions"])


def test_the_same_calibration_gives_the_same_bytes(moe: Path, statistics: Path, tokens: str, tmp_path: Path):
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats")])
    assert (tmp_path / "stats/stats.safetensors").read_bytes() == (statistics / "stats.safetensors").read_bytes()


def test_dry_run_writes_nothing_and_names_the_output(moe: Path, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats"), "--dry-run"])
    facts = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "stats").exists()
    assert facts["writes"] == {str(tmp_path / "stats"): 4 * 8 * (1 + 6 * 8 + 2 * 64 + 8 * 64 + 8 * 32)}
    assert facts["flops"] > 0


def damage(path: Path, name: str, value: float) -> None:
    """Set one entry of one tensor on disk."""
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["mlp.experts.5.down_proj.weight", "mlp.gate.weight", "self_attn.q_proj.weight"])
def test_a_nan_weight_is_named(name: str, tokens: str, tmp_path: Path, user_error: Callable[..., str]):
    path = tiny_qwen3_moe(tmp_path / "moe")
    damage(path, f"model.layers.2.{name}", float("nan"))
    message = user_error("calibrate", *calibration(path, tokens, tmp_path / "stats"))
    assert f"model.layers.2.{name}" in message
    assert not (tmp_path / "stats").exists()


def test_what_does_not_fit_is_refused(moe: Path, statistics: Path, tokens: str, tmp_path: Path, user_error: Callable[..., str]):
    arguments = calibration(moe, tokens, tmp_path / "stats")
    assert "did you mean 'gate_sum'" in user_error("calibrate", *arguments, "statistics=[gate_sums]")
    assert "did you mean 'batch_tokens'" in user_error("calibrate", *arguments, "batch_token=3")
    assert "device" in user_error("calibrate", *arguments, "device=abacus")
    assert "finished output" in user_error("calibrate", *calibration(moe, tokens, statistics))
    assert "has no layer of experts" in user_error("calibrate", *calibration(tiny_qwen3(tmp_path / "dense"), tokens, tmp_path / "stats"))
    foreign = write_tokens(tmp_path / "foreign", np.full(SEQUENCE, 300), 1000)
    assert "300" in user_error("calibrate", *calibration(moe, foreign, tmp_path / "stats"))


def test_overflowing_hidden_states_are_refused(tokens: str, tmp_path: Path, user_error: Callable[..., str]):
    path = tiny_qwen3_moe(tmp_path / "moe")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.0.down_proj.weight"] *= 1e38
    tensors["model.layers.1.post_attention_layernorm.weight"] *= 1e6
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert "hidden states" in user_error("calibrate", *calibration(path, tokens, tmp_path / "stats"))


def test_damaged_statistics_are_refused(statistics: Path, tmp_path: Path, user_error: Callable[..., str]):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "moe2dense.json").write_text((statistics / "moe2dense.json").read_text())
    assert "stats.safetensors" in user_error("score", f"statistics={broken}")
    (broken / "stats.safetensors").write_bytes((statistics / "stats.safetensors").read_bytes()[:-8])
    assert "truncated" in user_error("score", f"statistics={broken}")
    assert "moe2dense.json" in user_error("score", f"statistics={tmp_path}")


def test_a_router_that_casts_its_input_to_float32_runs_in_float64(tmp_path: Path):
    """Inkling2's, whose weights the class leaves in the compute type; everything else computes in float64 then."""
    moe, prefix = tiny_checkpoint(tmp_path / "moe", "inkling2_text"), write_tokens(tmp_path / "text", 160, vocab=128)
    found = []
    for dtype in ("float32", "float64"):
        data = [f"data.path={prefix}", "data.sequence_length=16", f"dtype={dtype}"]
        main(["calibrate", f"source={moe}", f"output={tmp_path / dtype}", *data])
        found.append(CalibratedStats.open(tmp_path / dtype).layers)
    for layer, stats in found[0].items():
        for name, value in stats.sums.items():
            assert np.abs(found[1][layer][name] - value).max() < 1e-5 * np.abs(value).max(), (layer, name)
