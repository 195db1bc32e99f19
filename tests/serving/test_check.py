"""`serve-check`: real llama.cpp and transformers, one that computes the same and one that does not; and what it says of engines."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.serving import check
from megatron_moe2dense.serving.compare import Row, judged
from megatron_moe2dense.serving.config import PythonConfig
from megatron_moe2dense.serving.engines import NotServedError, Place, find, own_words
from tests.helpers.tiny_models import tiny
from tests.serving.conftest import INTERPRETER, llama_server, program, with_tokenizer

QUICK = ("speed=false", "new_tokens=4")


def checked(source: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    main(["serve-check", str(source), f"output={output}", *QUICK, *settings])
    return json.loads(output.read_text())["rows"]


def test_engines_that_compute_the_same(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = checked(dense, tmp_path / "rows.json", "quantize=[Q8_0]")
    assert [(row["engine"], row["weights"], row["verdict"]) for row in rows] == [
        ("transformers", "float32", "same"),
        ("llama_cpp", "float32", "same"),
        ("llama_cpp", "Q8_0", "same"),
    ]
    whole, rounded = rows[1], rows[2]
    assert whole["difference"] < 1e-4 < rounded["difference"]
    assert whole["greedy"] == whole["tokens"] == "5/5"
    assert "Qwen3ForCausalLM" in capsys.readouterr().out


def test_speed_and_memory_beside_those_of_the_moe(dense: Path, tmp_path: Path) -> None:
    rows = checked(dense, tmp_path / "rows.json", "engines=[llama_cpp]", "speed=true", f"moe={dense}")
    assert [row["verdict"] for row in rows] == ["same", "measured"]
    assert all(row["peak_bytes"] > 1e6 and min(row["speed"].values()) > 0 for row in rows)


def test_an_engine_that_computes_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # llama.cpp clamps GPT-OSS at 7, whatever config.json says.
    sizes = {
        "vocab_size": 2048,
        "num_hidden_layers": 2,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "hidden_size": 128,
        "head_dim": 32,
    }
    source = with_tokenizer(tiny("gpt_oss", tmp_path / "source", "bfloat16", **sizes, intermediate_size=128, swiglu_limit=0.3))
    with pytest.raises(SystemExit) as ended:
        checked(source, tmp_path / "rows.json", "engines=[llama_cpp]")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "log-probabilities differ by" in said.err
    assert "xllamacpp" in said.out
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["verdict"] == "different"


def test_an_engine_that_does_not_know_the_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_tokenizer(
        tiny("deepseek_v2", tmp_path / "source", "bfloat16", vocab_size=2048, num_hidden_layers=1, first_k_dense_replace=1)
    )
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(SystemExit):
        checked(source, tmp_path / "rows.json", "engines=[llama_cpp]")
    assert "not served" in (said := capsys.readouterr()).out
    assert "NobodysForCausalLM" in said.err


def test_llama_server_by_its_path(dense: Path, tmp_path: Path) -> None:
    [row] = checked(dense, tmp_path / "rows.json", "engines=[llama_cpp]", f"python.llama_cpp={llama_server(tmp_path)}")
    assert (row["verdict"], row["greedy"]) == ("same", "5/5")
    assert row["version"].startswith("llama-server")


def test_a_server_that_ends_is_quoted(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = program(tmp_path / "llama-server", "#!/bin/sh\necho 'error: no such option'\nexit 1\n")
    with pytest.raises(SystemExit):
        checked(dense, tmp_path / "rows.json", "engines=[llama_cpp]", f"python.llama_cpp={server}")
    assert "no such option" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [("engines=[vllm]",), (f"python.vllm={INTERPRETER}",)])
def test_an_engine_that_is_not_there(settings: tuple[str, ...], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        checked(dense, tmp_path / "rows.json", *settings)
    assert ended.value.code == 2
    assert "has no vllm" in (said := capsys.readouterr().err)
    assert "pip install vllm" in said


def test_engines_are_those_that_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [place.engine for place in find(None, PythonConfig())] == ["transformers", "llama_cpp"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="llama-server: no program"):
        find(None, PythonConfig(llama_cpp="llama-server"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("engines=[]", "engines names none"),
        ("python.vllm=/nowhere/python", "python.vllm=/nowhere/python: no program"),
        ("python.llama_cpp=../nowhere/llama-server", "../nowhere/llama-server: no program"),
    ],
)
def test_engines_that_can_not_be_asked(settings: str, words: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        checked(dense, tmp_path / "rows.json", settings)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_run_is_exported_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit):
        checked(tmp_path / "run", tmp_path / "rows.json")
    assert "moe2dense export it first" in capsys.readouterr().err


def test_an_output_that_is_there(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(SystemExit):
        checked(dense, tmp_path / "rows.json")
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "rows.json").read_text() == "{}"


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny("qwen3", tmp_path / "source", "bfloat16", num_hidden_layers=1)
    with pytest.raises(SystemExit):
        checked(source, tmp_path / "rows.json")
    assert "no tokenizer files" in capsys.readouterr().err


def test_draft_asks_for_a_moe(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checked(dense, tmp_path / "rows.json", "draft=4")
    assert "draft asks for moe" in capsys.readouterr().err


REFERENCE = {
    "logprobs": [[-0.5, -1.5, -1.7], [-2.0, -0.3, -2.1]],
    "greedy": [[0, 1], [1, 1]],
    "margins": [[1.0, 1e-5], [1.0, 1.0]],
    "tokens": [[1, 2], [3]],
    "special": [1],
}


def answer(**changed: Any) -> dict[str, Any]:
    return copy.deepcopy(REFERENCE) | {"version": "engine 1", "peak_bytes": 1} | changed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"logprobs": [[-0.5, -1.5, -1.7], [-2.0, -0.3, -2.2]]}, "differ by 0.1 nats"),
        ({"logprobs": [[-0.5, -1.5, -1.7], [-2.0, -0.3, float("-inf")]]}, "differ by"),
        ({"greedy": [[0, 2], [1, 1]]}, ""),  # the two best are as near as the bound
        ({"greedy": [[0, 1], [0, 1]]}, "other greedy tokens after 1 of 2"),
        ({"greedy": [[0, 1], [1]]}, "other greedy tokens after 1 of 2"),
        ({"greedy": [[0, 1], [1]], "ended": [False, True]}, ""),  # with a special token, where the text ends
        ({"greedy": [[0], [1, 1]], "ended": [True, False]}, "other greedy tokens after 1 of 2"),
        ({"greedy": [[0, 1], []], "ended": [False, False]}, "other greedy tokens after 1 of 2"),
        ({"tokens": [[1, 2], [4]]}, "other tokens for 1 of 2"),
    ],
)
def test_what_counts_as_a_difference(changed: dict[str, Any], reason: str) -> None:
    row = judged(Row("engine", "Model", "float32"), REFERENCE, answer(**changed), (1e-3, None))
    assert row.verdict == ("different" if reason else "same")
    assert reason in row.reason


def test_rounded_weights_are_judged_by_kl() -> None:
    far = answer(logprobs=[[-3.0, -0.5, -1.7], [-2.0, -0.3, -2.1]], greedy=[[2, 2], [1, 1]])
    assert judged(Row("engine", "Model", "Q8_0"), REFERENCE, answer(greedy=[[2, 2], [1, 1]]), (None, 0.1)).verdict == "same"
    assert "KL" in judged(Row("engine", "Model", "Q8_0"), REFERENCE, far, (None, 0.1)).reason


def test_an_engine_s_own_words() -> None:
    said = "INFO loading\nTraceback (most recent call last):\n  File x\nValueError: Model architectures ['A'] are not supported\n"
    assert own_words(said) == "ValueError: Model architectures ['A'] are not supported"
    assert (
        own_words("[rank0]:     raise A\n[rank0]:           ^^^^^\n[rank0]: RuntimeError: No layer found\n")
        == "RuntimeError: No layer found"
    )
    assert "unknown model architecture: 'a'" in own_words(f"llama_model_load: error loading model: unknown model architecture: 'a'\n{said}")
    assert own_words("no\nexception\nhere") == "exception here"
    assert os.linesep not in own_words(said)


def test_vllm_runs_the_class_of_transformers_where_its_own_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def ask(place: Place, request: dict[str, Any], folder: Path) -> dict[str, Any]:
        asked.append(request)
        if "model_impl" not in request:
            raise NotServedError("RuntimeError: No MoE layer found")
        return answer()

    monkeypatch.setattr(Place, "ask", ask)
    found, said = check._answer(Place("vllm", "python"), {"model": "m"}, tmp_path)
    assert found == answer()
    assert said == "with --model-impl transformers, as its own class says: RuntimeError: No MoE layer found"
    assert [request.get("model_impl") for request in asked] == [None, "transformers"]
    with pytest.raises(NotServedError, match="No MoE layer"):
        check._answer(Place("llama_cpp", "python"), {"model": "m"}, tmp_path)


def test_an_engine_that_crashes(tmp_path: Path) -> None:
    place = Place("vllm", str(program(tmp_path / "python", "#!/bin/sh\nkill -ABRT $$\n")))
    with pytest.raises(NotServedError, match="it crashed"):
        place.ask({}, tmp_path)
