"""`serve-check draft`: a model guesses another's next tokens in llama.cpp, which takes those that it would have written."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.serving import gguf
from megatron_moe2dense.serving.compare import Row, guessed
from megatron_moe2dense.serving.config import GgufConfig
from megatron_moe2dense.serving.engines import Place
from megatron_moe2dense.serving.gguf import RUNNERS
from tests.helpers.tiny_models import tiny
from tests.serving.conftest import llama_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> dict[str, Path]:
    """A student and a MoE, strangers with one tokenizer: folders, and their files for llama.cpp."""
    root = tmp_path_factory.mktemp("draft")
    found = {}
    for family, name in (("qwen3", "student"), ("qwen3_moe", "moe")):
        folder = tiny(family, root / name, vocab_size=2048, num_hidden_layers=2, head_dim=32, hidden_size=64, initializer_range=0.2)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_directory / file, folder)
        gguf.write(folder, root / f"{name}.gguf", "float32", GgufConfig())
        found |= {name: folder, f"{name}.gguf": root / f"{name}.gguf"}
    return found


def asked(models: dict[str, Path], place: Place, folder: Path, model: str, draft: str | None) -> dict[str, Any]:
    """An engine's answer, with three tokens guessed ahead by a draft model."""
    request = {
        "model": str(models[model]),
        "draft": draft and {"model": str(models[draft]), "tokens": 3},
        "prompts": [[5, 6, 7, 8], list(range(100, 120))],
        "texts": [],
        "vocabulary": 2048,
        "context": 64,
        "new_tokens": 12,
        "threads": 1,
        "speed": None,
    }
    return place.ask(request, folder)


@pytest.fixture(params=["package", "program"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """llama.cpp as a package of this interpreter, and as a program."""
    if request.param == "package":
        return Place("llama_cpp", sys.executable)
    return Place("llama_cpp", sys.executable, str(llama_server(tmp_path)))


def test_a_model_takes_its_own_guesses(models: dict[str, Path], place: Place, tmp_path: Path):
    """Three of its guesses and a token of its own in each pass: 12 tokens in three."""
    alone, drafted = (asked(models, place, tmp_path, "student.gguf", draft) for draft in (None, "student.gguf"))
    assert drafted["greedy"] == alone["greedy"]
    assert alone["written"]["guessed"] == 0
    assert drafted["written"]["guessed"] == drafted["written"]["accepted"] >= 2 * 8
    assert drafted["written"]["passes"] == 2 * 12 - drafted["written"]["accepted"]


def test_guesses_of_a_stranger_change_no_token(models: dict[str, Path], place: Place, tmp_path: Path):
    alone, drafted = (asked(models, place, tmp_path, "moe.gguf", draft) for draft in (None, "student.gguf"))
    assert drafted["greedy"] == alone["greedy"]
    assert 0 <= drafted["written"]["accepted"] < drafted["written"]["guessed"] / 2


def test_serve_check_says_what_is_taken(models: dict[str, Path], tmp_path: Path):
    settings = ["engines=[llama_cpp]", "draft=3", "speed=false", "new_tokens=8", f"output={tmp_path}/rows.json"]
    main(["serve-check", str(models["student"]), f"moe={models['student']}", *settings])
    _, alone, drafted = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (alone["reason"], drafted["verdict"], drafted["greedy"]) == ("", "measured", "5/5")
    assert drafted["reason"].startswith("100% of the guesses taken, ")
    assert "3 guessed by Qwen3ForCausalLM" in drafted["model"]


def test_other_tokens_than_alone_are_counted():
    alone = {"greedy": [[1, 2, 3], [4, 5, 6]]}
    answer = {"greedy": [[1, 2, 3], [4, 5, 7]], "version": "1", "peak_bytes": 1, "written": {"passes": 3, "guessed": 5, "accepted": 3}}
    row = guessed(Row("vllm", "Model", "float32"), alone, answer)
    assert (row.greedy, row.reason) == ("1/2", "60% of the guesses taken, 2.00 tokens a pass")


def test_vllm_is_told_of_the_draft(monkeypatch: pytest.MonkeyPatch):
    """As vLLM 0.32 names it."""
    monkeypatch.syspath_prepend(RUNNERS)
    assert runpy.run_path(str(RUNNERS / "ask_vllm.py"))["_speculative"]({"model": "student", "tokens": 3}) == {
        "method": "draft_model",
        "model": "student",
        "num_speculative_tokens": 3,
    }
