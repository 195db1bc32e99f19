"""What `export` makes of a Hugging Face folder: plain or FP8, against stock transformers, compressed-tensors and float64."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.cli import main
from tests.helpers.quantised import as_fp8
from tests.helpers.tiny_models import tiny, tiny_qwen3, write_tokens

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("dense") / "plain", num_hidden_layers=2)


@pytest.fixture(scope="module")
def eight_bit(plain: Path) -> Path:
    main(["export", str(plain), f"output={plain.parent}/fp8", "format=fp8"])
    return plain.parent / "fp8"


def rounded(directory: Path) -> dict[str, torch.Tensor]:
    """float64 numbers of the written codes and scales."""
    stored = load_file(directory / "model.safetensors")
    weights = {name: tensor.double() for name, tensor in stored.items() if not name.endswith("_scale")}
    return {name: tensor * stored[f"{name}_scale"].double() if f"{name}_scale" in stored else tensor for name, tensor in weights.items()}


def reference(plain: Path, weights: dict[str, torch.Tensor], rounds_inputs: bool) -> torch.Tensor:
    """Logits in float64. rounds_inputs: those of layers in FP8 are, with a scale a token of their largest over 448."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64)
    model.load_state_dict(weights)

    def on_grid(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        scale = given[0].abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        return (given[0] / scale).to(torch.float8_e4m3fn).double() * scale

    for name, module in model.named_modules():
        if rounds_inputs and isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(on_grid)
    with torch.no_grad():
        return model(TOKENS).logits


def stock(directory: Path, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, **options)(TOKENS).logits.double()


@pytest.mark.parametrize("rounds_inputs", [False, True], ids=["weights alone", "as it is served"])
def test_stock_transformers_runs_the_rounded_model(plain: Path, eight_bit: Path, rounds_inputs: bool):
    wanted = reference(plain, rounded(eight_bit), rounds_inputs)
    options = {} if rounds_inputs else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert (stock(eight_bit, **options) - wanted).abs().max() < 2e-6
    assert (stock(plain) - wanted).abs().max() > 1e-3


def test_codes_are_those_nearest_to_the_weights(plain: Path, eight_bit: Path):
    whole, found = load_file(plain / "model.safetensors"), rounded(eight_bit)
    assert whole.keys() == found.keys()
    for name, weight in whole.items():
        if "layers" in name and "norm" not in name:
            largest = weight.abs().amax(1, keepdim=True)
            # Three bits of mantissa; numbers below the least normal one lie on a grid of 2^-9 of the scale.
            assert ((found[name] - weight).abs() <= torch.maximum(weight.abs() * 2**-4, largest / 448 * 2**-10) * 1.001).all()
        else:
            assert torch.equal(found[name].float(), weight)


def test_our_reader_and_the_library_read_the_same(eight_bit: Path):
    values = Values(CheckpointIndex.open(eight_bit))
    stored, scheme = load_file(eight_bit / "model.safetensors"), preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    library = BaseCompressor.get_value_from_registry("float-quantized")
    assert len(values.encoded) == 2 * 7
    with CheckpointReader(values.index) as reader:
        for name in values.encoded:
            parts = {"weight": stored[name], "weight_scale": stored[f"{name}_scale"]}
            assert torch.equal(values.reader(reader)(name, None), library.decompress(parts, scheme)["weight"].to(torch.bfloat16))


def test_an_evaluation_of_it_is_that_of_its_numbers(eight_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["export", str(eight_bit), f"output={tmp_path}/decoded"])
    assert "quantization_config" not in json.loads((tmp_path / "decoded/config.json").read_text())
    data = f"perplexity.data={{path: {write_tokens(tmp_path / 'text', 400)}, sequence_length: 32}}"
    main(["eval", f"models={{fp8: {eight_bit}, decoded: {tmp_path}/decoded}}", f"output={tmp_path}/records.jsonl", data])
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert rows[0]["metrics"]["nll"] == rows[1]["metrics"]["nll"]
    capsys.readouterr()


@pytest.mark.parametrize(("family", "router"), [("olmoe", "mlp.gate"), ("gpt_oss", "mlp.router"), ("deepseek_v2", "mlp.gate")])
def test_routers_and_stacks_of_experts_stay_as_they_are(family: str, router: str, tmp_path: Path):
    source = tiny(family, tmp_path / "model", dtype="bfloat16", num_hidden_layers=2)
    main(["export", str(source), f"output={tmp_path}/fp8", "format=fp8"])
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "fp8/model.safetensors")
    codes = {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    assert any("q_proj" in name for name in codes)
    assert all(after[name].dtype == torch.bfloat16 for name in after.keys() - codes)
    kept = [
        name for name in before if f"{router}." in name or ".experts." in name or "embed" in name or "lm_head" in name or "norm" in name
    ]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert before.keys() - kept == codes | {name for name in before if name.endswith(("bias", "sinks"))} - set(kept)
    content = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.mlp.experts"} <= set(content["ignore"])


def test_a_folder_in_another_type_and_a_quantised_one_become_plain(plain: Path, tmp_path: Path):
    main(["export", str(plain), f"output={tmp_path}/half", "dtype=bfloat16"])
    whole, half = load_file(plain / "model.safetensors"), load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in whole.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    main(["export", str(as_fp8(plain, tmp_path / "blocks")), f"output={tmp_path}/again", "format=fp8"])
    assert CheckpointIndex.open(tmp_path / "again").config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_without_the_library_the_extra_is_named(
    plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user_error: Callable[..., str]
):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    for flag in ([], ["--dry-run"]):
        message = user_error("export", str(plain), f"output={tmp_path}/fp8", "format=fp8", *flag)
        assert "megatron_moe2dense[export]" in message
    assert not list(tmp_path.iterdir())
