"""FFN widths that stock kernels and quantised formats take: filled up with zeros that change nothing, counted, said and in every budget."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.content import config_hash
from megatron_moe2dense.surgery import convert, inspect
from megatron_moe2dense.surgery.config import ConvertConfig, InspectConfig
from tests.helpers.tiny_models import tiny, tiny_qwen3, write_tokens

LENGTH = 32
# Experts of odd widths: of two, 40, 24, 24 and, with the shared one, 60 neurons.
ODD: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 20},
    "olmoe": {"intermediate_size": 12},
    "gpt_oss": {"intermediate_size": 12},
    "deepseek_v2": {"moe_intermediate_size": 12, "n_shared_experts": 3, "intermediate_size": 100},
}


@dataclass(frozen=True)
class Odd:
    """A MoE with odd widths and its statistics."""

    folder: Path

    def arguments(self, output: Path, *more: str) -> list[str]:
        return [f"source={self.folder}/moe", f"statistics={self.folder}/stats", f"output={output}", *more]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("text") / "tokens", LENGTH * 20)


@pytest.fixture(scope="module", params=list(ODD))
def odd(request: pytest.FixtureRequest, text: str, tmp_path_factory: pytest.TempPathFactory) -> Odd:
    return made(request.param, text, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(text: str, tmp_path_factory: pytest.TempPathFactory) -> Odd:
    return made("qwen3_moe", text, tmp_path_factory.mktemp("qwen"))


def made(family: str, text: str, folder: Path) -> Odd:
    tiny(family, folder / "moe", **ODD[family])
    main(["calibrate", f"source={folder}/moe", f"output={folder}/stats", f"data.path={text}", f"data.sequence_length={LENGTH}"])
    return Odd(folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "moe2dense.json").read_text())


def logits(folder: Path, dtype: torch.dtype, **how: Any) -> torch.Tensor:
    """Of stock transformers."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)(torch.arange(40)[None]).logits


@pytest.mark.slow
def test_padding_changes_nothing_and_runs_everywhere(odd: Odd, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """experts of a width that kernels do not take: zeros up to the next multiple of 32, said and counted; the function is the same"""
    capsys.readouterr()
    main(["convert", *odd.arguments(tmp_path / "padded")])
    said = capsys.readouterr().out
    main(["convert", *odd.arguments(tmp_path / "plain", "pad_to=1")])
    width, plain = (config_of(tmp_path / name)["intermediate_size"] for name in ("padded", "plain"))
    assert width % 32 == 0 < width - plain < 32
    counted = manifest_of(tmp_path / "padded")["width"]
    assert (counted["width"], counted["multiple"]) == (width, 32)
    assert f"{counted['neurons']:,} neurons of zeros, {counted['parameters']:,} parameters" in said
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("padded", "plain")]
    added = sum(tensor.numel() for tensor in tensors[0].values()) - sum(tensor.numel() for tensor in tensors[1].values())
    rows = (width - plain) * len({name.split("layers.")[1].split(".")[0] for name in tensors[0] if "down_proj" in name})
    before = manifest_of(tmp_path / "plain")["width"]
    assert (counted["parameters"] - before["parameters"], counted["neurons"] - before["neurons"]) == (added, rows)
    found = [logits(tmp_path / name, torch.float64, experts_implementation="eager") for name in ("padded", "plain")]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-13)
    for dtype in (torch.float32, torch.bfloat16):  # with the kernel that a model gets unasked
        assert logits(tmp_path / "padded", dtype).isfinite().all()


@pytest.mark.slow
def test_a_multiple_of_256_for_k_quants(odd: Odd, tmp_path: Path):
    """pad_to=256: every FFN of the result has such a width, those of dense layers too"""
    main(["convert", *odd.arguments(tmp_path / "dense", "pad_to=256")])
    downs = {name: tensor for name, tensor in load_file(tmp_path / "dense/model.safetensors").items() if name.endswith("down_proj.weight")}
    experts = {name: tensor for name, tensor in load_file(tmp_path / "dense/model.safetensors").items() if name.endswith("down_proj")}
    assert {tensor.shape[-1] for tensor in downs.values()} | {tensor.shape[-2] for tensor in experts.values()} == {256}
    assert config_of(tmp_path / "dense")["intermediate_size"] == 256


def test_no_padding_where_the_width_is_a_multiple(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """widths that are multiples anyway, as all published ones: no zeros, and byte for byte what pad_to=1 writes"""
    tiny("qwen3_moe", tmp_path / "moe")
    main(["calibrate", f"source={tmp_path}/moe", f"output={tmp_path}/stats", f"data.path={text}", f"data.sequence_length={LENGTH}"])
    for name, more in (("default", ()), ("one", ("pad_to=1",))):
        main(["convert", *Odd(tmp_path).arguments(tmp_path / name, *more)])
    assert "zeros" not in capsys.readouterr().out
    default, one = (manifest_of(tmp_path / name) for name in ("default", "one"))
    assert default["config_hash"] == one["config_hash"]
    assert default["width"]["neurons"] == 0
    for file in ("model.safetensors", "config.json", "plan.json"):
        assert (tmp_path / "default" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


@pytest.mark.slow
def test_a_conversion_of_an_earlier_version_goes_on(text: str, qwen: Odd, tmp_path: Path, user_error: Any, monkeypatch: pytest.MonkeyPatch):
    """an unfinished conversion of a version that did not pad: goes on where the width is a multiple; else with pad_to=1, which is said"""
    tiny("qwen3_moe", tmp_path / "moe")
    main(["calibrate", f"source={tmp_path}/moe", f"output={tmp_path}/stats", f"data.path={text}", f"data.sequence_length={LENGTH}"])
    even = Odd(tmp_path)

    def begin(of: Odd, name: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(convert, "write_dense", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                main(["convert", *of.arguments(tmp_path / name, "pad_to=1")])
        path = tmp_path / f"{name}.tmp/moe2dense.json"
        content = json.loads(path.read_text())
        del content["width"]
        for key in ("config", "identity"):
            content[key]["pad_to"] = 1
        content["config_hash"] = "0" * 16  # which had a pad_to of 1 in it
        path.write_text(json.dumps(content))
        return tmp_path / name

    output = begin(even, "goes on")
    main(["convert", *even.arguments(output)])
    assert output.exists()
    output = begin(qwen, "began unpadded")
    assert "pad_to: 1 -> 32" in user_error("convert", *qwen.arguments(output))
    main(["convert", *qwen.arguments(output, "pad_to=1")])
    assert config_of(output)["intermediate_size"] == 40


def test_nothing_padded_is_as_before_there_was_padding():
    """pad_to of 1, recorded by an earlier version, or none: one and the same run"""
    assert config_hash({"pad_to": 1, "keep": 2}) == config_hash({"keep": 2}) != config_hash({"pad_to": 32, "keep": 2})


def test_what_is_said_before_converting_counts_the_zeros(qwen: Odd, tmp_path: Path, capsys: pytest.CaptureFixture[str], user_error: Any):
    """inspect and the dry runs of convert and select: the size and the zeros of what convert will write; of a dense model, refused"""
    main(["convert", *qwen.arguments(tmp_path / "dense")])
    capsys.readouterr()
    config = ConvertConfig(source=f"{qwen.folder}/moe", statistics=f"{qwen.folder}/stats", output=str(tmp_path / "x"))
    dry, seen = convert.dry_run(config), inspect.inspect(InspectConfig(source=f"{qwen.folder}/moe"))["dense"]
    counted = manifest_of(tmp_path / "dense")["width"]
    assert dry["padding"] == seen["padding"] == counted
    tensors = load_file(tmp_path / "dense/model.safetensors")
    assert dry["parameters"] == seen["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    main(["inspect", f"{qwen.folder}/moe"])
    assert (
        "of it 96 neurons of zeros, 18,432 parameters (24 of the 64 in a MoE layer), for widths in multiples of 32"
        in capsys.readouterr().out
    )
    main(["select", *qwen.arguments(tmp_path / "neurons"), "select.method=energy", "--dry-run"])
    said = json.loads(capsys.readouterr().out)
    assert (said["neurons"]["chosen"], said["padding"]["zeros"]) == (64, 0)
    tiny_qwen3(tmp_path / "qwen3")
    assert "drop pad_to" in user_error("inspect", str(tmp_path / "qwen3"), "pad_to=256")


@pytest.mark.slow
def test_chosen_neurons_take_the_place_of_zeros(qwen: Odd, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], user_error: Any):
    """select where a width would be rounded up: as many neurons as it has room for, no zeros; convert asks for the same pad_to"""
    plans = {}
    for pad_to in (1, 32, 256):
        main(["select", *qwen.arguments(tmp_path / f"by {pad_to}", "select.method=energy", f"pad_to={pad_to}")])
        plans[pad_to] = json.loads((tmp_path / f"by {pad_to}/plan.json").read_text())["layers"]
    counts = {pad_to: {len(layer["neurons"]) for layer in layers} for pad_to, layers in plans.items()}
    assert counts == {1: {40}, 32: {64}, 256: {160}}  # all there are, the last
    for few, more in zip(plans[1], plans[32], strict=True):
        best = set(zip(few["experts"], few["neurons"], strict=True))
        assert best < set(zip(more["experts"], more["neurons"], strict=True))
        assert few["scale"] * 40 == pytest.approx(more["scale"] * 64)
    planned = (f"source={qwen.folder}/moe", f"plan={tmp_path}/by 32/plan.json", f"output={tmp_path}/dense")
    assert "64 neurons a layer, pad_to=1" in user_error("convert", *planned, "pad_to=1")
    refit = (f"data.path={text}", f"data.sequence_length={LENGTH}", "refit.method=ridge")
    for name, more in (("dense", ()), ("refitted", refit)):
        capsys.readouterr()
        main(["convert", *planned[:2], f"output={tmp_path / name}", *more])
        assert "zeros" not in capsys.readouterr().out
        tensors = load_file(tmp_path / name / "model.safetensors")
        downs = [tensor for key, tensor in tensors.items() if key.endswith("down_proj.weight")]
        assert all(tensor.shape == (64, 64) and tensor.any(0).all() for tensor in downs)
    main(["convert", *planned[:1], f"plan={tmp_path}/by 256/plan.json", f"output={tmp_path}/wide", "pad_to=256"])
    assert manifest_of(tmp_path / "wide")["width"]["zeros"] == 256 - 160


@pytest.mark.slow
def test_a_budget_counts_the_zeros(qwen: Odd, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """auto with a budget that holds two experts' neurons but not the zeros beside them: one expert's width; its command pads alike"""

    def parameters(keep: int, pad_to: int) -> int:
        return inspect.inspect(InspectConfig(source=f"{qwen.folder}/moe", keep=keep, pad_to=pad_to))["dense"]["parameters"]

    held_out = write_tokens(tmp_path / "held_out", LENGTH * 4, seed=7)
    arguments = [*qwen.arguments(tmp_path / "auto"), f"data.path={held_out}", f"refit_data.path={text}", "halvings=0", "select=[energy]"]
    arguments += [f"{block}.sequence_length={LENGTH}" for block in ("data", "refit_data")]
    arguments += ["grid.score=[sf]", "grid.scale=[uniform]", "grid.refit=[null]"]
    budget = parameters(2, 1)
    assert parameters(1, 32) <= budget < parameters(2, 32)
    for pad_to, groups in (("pad_to=1", 2), ("pad_to=32", 1)):
        capsys.readouterr()
        main(["auto", *arguments, f"budget.parameters={budget}", pad_to, "--dry-run"])
        assert json.loads(capsys.readouterr().out)["groups"] == groups
    main(["auto", *arguments, f"budget.parameters={parameters(1, 256)}", "pad_to=256"])
    command = capsys.readouterr().out.splitlines()[-1].partition("moe2dense ")[2]
    assert " pad_to=256 " in command
    report = json.loads((tmp_path / "auto/auto.json").read_text())
    assert report["groups"] == 8  # 160 neurons, which take no more than 20 do
    main([*command.split()[:-1], f"output={tmp_path}/dense"])
    written = load_file(tmp_path / "dense/model.safetensors")
    assert sum(tensor.numel() for tensor in written.values()) == report["parameters"]


def test_pruning_to_a_width_that_some_kernels_do_not_take(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """prune-dense to an intermediate_size that is no multiple of 32: as asked, and said with the next ones that are"""
    tiny_qwen3(tmp_path / "model")
    arguments = [f"source={tmp_path}/model", f"data.path={text}", f"data.sequence_length={LENGTH}"]
    main(["prune-dense", *arguments, f"output={tmp_path}/odd", "target.intermediate_size=100"])
    assert "intermediate_size 100 is no multiple of 32, as FP8 kernels and GGUF's Q8_0 want it: 96 or 128 is" in capsys.readouterr().out
    main(["prune-dense", *arguments, f"output={tmp_path}/even", "target.intermediate_size=96"])
    assert "multiple" not in capsys.readouterr().out
