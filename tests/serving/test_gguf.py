"""`export format=gguf`: judged by llama.cpp's own server, which reads the file, and by stock transformers."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.serving import gguf
from megatron_moe2dense.serving.config import GgufConfig
from megatron_moe2dense.serving.engines import Place
from megatron_moe2dense.serving.metadata import disagreements
from tests.helpers.tiny_models import tiny
from tests.serving.conftest import with_tokenizer

PROMPTS = [[5, 6, 7, 8], [1000, 2, 3]]
CHECKOUT = gguf.Tools.find(GgufConfig(), None).checkout


def export(source: Path, output: Path, *settings: str) -> Path:
    main(["export", str(source), f"output={output}", "format=gguf", *settings])
    return output


def log_probabilities(file: Path, folder: Path) -> torch.Tensor:
    """After each of PROMPTS [prompt, vocabulary], by llama.cpp."""
    request = {
        "model": str(file),
        "texts": [],
        "prompts": PROMPTS,
        "vocabulary": 2048,
        "new_tokens": 2,
        "context": 64,
        "threads": 1,
        "speed": None,
    }
    return torch.tensor(Place("llama_cpp", sys.executable).ask(request, folder)["logprobs"], dtype=torch.float64)


def stock(source: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for prompt in PROMPTS])


def test_llama_cpp_computes_what_stock_transformers_does(dense: Path, tmp_path: Path) -> None:
    output = export(dense, tmp_path / "out", "dtype=float32")
    assert [path.name for path in sorted(output.iterdir())] == ["model-F32.gguf", "moe2dense.json"]
    torch.testing.assert_close(log_probabilities(output / "model-F32.gguf", tmp_path), stock(dense), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "kl"), [("Q8_0", 1e-3), ("Q4_K_M", 1e-1)])
def test_a_quantised_file_is_near(dense: Path, tmp_path: Path, kind: str, kl: float, capsys: pytest.CaptureFixture[str]) -> None:
    output = export(dense, tmp_path / "out", f"quantize={kind}")
    found, meant = log_probabilities(output / f"model-{kind}.gguf", tmp_path), stock(dense)
    nats = (meant.exp() * (meant - found)).sum(-1)
    assert 1e-9 < nats.max() < kl
    assert ("larger than Q4_K_M would be" in capsys.readouterr().err) == (kind == "Q4_K_M")  # rows of 128
    assert not list(output.glob("*.whole.gguf"))


def test_the_file_is_of_the_source_s_type_and_says_so(dense: Path, tmp_path: Path) -> None:
    output = export(dense, tmp_path / "out")
    described = gguf.describe(output / "model-BF16.gguf", CHECKOUT)
    assert {tensor["type"] for name, tensor in described["tensors"].items() if len(tensor["shape"]) > 1} == {"BF16"}
    assert described["fields"]["tokenizer.ggml.pre"] == "gpt-2"  # by its pattern: the converter knows no hash of it
    assert disagreements(dense, described) == []


def test_a_file_that_says_otherwise_than_config_json_is_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gguf.describe

    def other(file: Path, checkout: Path) -> dict[str, Any]:
        content = real(file, checkout)
        content["fields"] |= {
            "qwen3.rope.freq_base": 1e6,
            "qwen3.block_count": 3,
            "qwen3.context_length": 16,
            "tokenizer.ggml.tokens": {"length": 2000},
        }
        content["tensors"].pop("output_norm.weight")
        return content

    monkeypatch.setattr(gguf, "describe", other)
    with pytest.raises(SystemExit) as ended:
        export(dense, tmp_path / "out", "dtype=float32")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for wrong in (
        "block_count is 3, not 2",
        "context_length is 16, not",
        "rope.freq_base is 1000000.0, not 10000",
        "2000 tokens, not 2048",
        "numbers, not",
    ):
        assert wrong in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.tmp/*.gguf"))


def refusal(capsys: pytest.CaptureFixture[str], source: Path, output: Path, *settings: str) -> str:
    with pytest.raises(SystemExit) as ended:
        export(source, output, *settings)
    assert ended.value.code == 2
    assert not output.exists()
    return capsys.readouterr().err


def test_without_a_converter(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf.metadata, "distribution", absent)
    assert "megatron_moe2dense[gguf]" in refusal(capsys, dense, tmp_path / "out")
    assert "no convert_hf_to_gguf.py" in refusal(capsys, dense, tmp_path / "out", f"gguf.converter={tmp_path}")


def test_without_what_quantises(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    named = ("quantize=Q4_K_M", f"gguf.quantizer={tmp_path}/llama-quantize")
    assert "no program" in refusal(capsys, dense, tmp_path / "out", *named)
    monkeypatch.setattr(gguf.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Q8_0 needs neither" in refusal(capsys, dense, tmp_path / "out", "quantize=Q4_K_M")


def test_quantize_is_of_gguf(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(dense), f"output={tmp_path}/out", "quantize=Q8_0"])
    assert "are of format=gguf" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny("qwen3", tmp_path / "source", "bfloat16", num_hidden_layers=1)
    assert "no tokenizer files" in refusal(capsys, source, tmp_path / "out")


def test_a_tokenizer_of_no_known_pattern(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    content = json.loads((source / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}|\s+"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}],
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert "gguf.pre_tokenizer=NAME" in refusal(capsys, source, tmp_path / "out", "dtype=float32")
    output = export(source, tmp_path / "told", "dtype=float32", "gguf.pre_tokenizer=llama-bpe")
    assert json.loads((output / "moe2dense.json").read_text())["config"]["gguf"]["pre_tokenizer"] == "llama-bpe"
    assert gguf.describe(output / "model-F32.gguf", CHECKOUT)["fields"]["tokenizer.ggml.pre"] == "llama-bpe"


def test_a_class_that_the_converter_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_tokenizer(tiny("qwen3", tmp_path / "source", "bfloat16", vocab_size=2048, num_hidden_layers=1))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    said = refusal(capsys, source, tmp_path / "out")
    assert "NobodysForCausalLM" in said
