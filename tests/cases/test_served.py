"""`eval` asks an engine that serves the model, and the engine or the question is not as it should be."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from tests.helpers.served import Engine, serving
from tests.helpers.tiny_models import tiny_qwen3

pytestmark = pytest.mark.slow

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    folder = tiny_qwen3(tmp_path_factory.mktemp("served") / "student", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_directory / name, folder / name)
    return folder


@pytest.fixture
def generating(tmp_path: Path) -> str:
    """A task that is judged by generated text alone."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "To be, or"}) + "\n")
    task = {
        "task": "generated",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
    }
    (tmp_path / "generated.yaml").write_text(yaml.safe_dump(task))
    return f"harness.tasks=[{tmp_path}/generated.yaml]"


def asking(model: Path, url: str, example: Path, output: Path, *more: str) -> list[str]:
    data = f"perplexity.data={{path: {example}/tokens/heldout, sequence_length: 32, sequences: 8}}"
    return ["eval", f"models=[{model}]", f"output={output}", f"endpoint.url={url}", data, "perplexity.batch_tokens=64", *more]


def test_no_engine_at_the_address(model: Path, example: Path, tmp_path: Path, user_error: Refused):
    """`eval` with an `endpoint` where nobody answers: refused before anything is asked, nothing written"""
    said = user_error(*asking(model, "http://127.0.0.1:9/v1", example, tmp_path / "r.jsonl"))
    assert "http://127.0.0.1:9/v1/models: nobody answers" in said
    assert not (tmp_path / "r.jsonl").exists()


def test_an_address_without_v1(model: Path, example: Path, tmp_path: Path, user_error: Refused):
    """an `endpoint.url` that is no API's: refused with the status, and what is missing"""
    with serving(Engine(model)) as url:
        said = user_error(*asking(model, url.removesuffix("/v1"), example, tmp_path / "r.jsonl"))
    assert "/models: 404" in said
    assert "with its /v1" in said


def test_a_key_is_asked_for(model: Path, example: Path, tmp_path: Path, user_error: Refused, monkeypatch: pytest.MonkeyPatch):
    """an engine that asks for a key: OPENAI_API_KEY of the environment is sent; without it, refused and named"""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(Engine(model, key="secret")) as url:
        assert "OPENAI_API_KEY" in user_error(*asking(model, url, example, tmp_path / "r.jsonl"))
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        main(asking(model, url, example, tmp_path / "r.jsonl"))
    assert "secret" not in (tmp_path / "r.jsonl").read_text()


def test_another_name_is_served(model: Path, example: Path, tmp_path: Path, user_error: Refused):
    """an `endpoint.model` that is not served: refused with the names that are"""
    with serving(Engine(model, name="teacher")) as url:
        said = user_error(*asking(model, url, example, tmp_path / "r.jsonl", "endpoint.model=student"))
    assert "serves no 'student' models: teacher" in said


def test_another_folder_is_served(model: Path, example: Path, tmp_path: Path, user_error: Refused):
    """an engine that serves another folder than `models` says: refused with both; a copy of it is taken"""
    other, copy = tiny_qwen3(tmp_path / "other", vocab_size=2048), shutil.copytree(model, tmp_path / "copy")
    with serving(engine := Engine(model)) as url:
        engine.listed["root"] = str(other)
        said = user_error(*asking(model, url, example, tmp_path / "r.jsonl"))
        engine.listed["root"] = str(copy)
        main(asking(model, url, example, tmp_path / "r.jsonl"))
    assert f"serves {other}" in said
    assert str(model) in said


def test_another_tokenizer_is_served(model: Path, example: Path, tmp_path: Path, user_error: Refused):
    """an engine with another tokenizer than the folder: refused with what it reads"""
    other = shutil.copytree(model, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [content["decoder"], {"type": "Replace", "pattern": {"String": "e"}, "content": "x"}],
    }
    (other / "tokenizer.json").write_text(json.dumps(content))
    with serving(Engine(model, reads=other)) as url:
        said = user_error(*asking(model, url, example, tmp_path / "r.jsonl"))
    assert "reads the tokens of 'The meaning of 12 words.' as 'Thx mxaning of 12 words." in said


@pytest.mark.parametrize("like", ["llama.cpp", "refusing"])
def test_an_engine_without_scores_of_prompts(
    model: Path, example: Path, generating: str, tmp_path: Path, user_error: Refused, like: str, capsys: pytest.CaptureFixture[str]
):
    """an engine that gives no log-probabilities of prompts, as llama.cpp's: refused by that name; tasks that only generate are scored"""
    with serving(engine := Engine(model, like=like)) as url:
        said = user_error(*asking(model, url, example, tmp_path / "r.jsonl"))
        main(["eval", f"models=[{model}]", f"output={tmp_path}/r.jsonl", f"endpoint.url={url}", generating])
    assert "log-probabilities of a prompt's own tokens (`echo` with `logprobs`), for perplexity" in said
    assert "llama.cpp" in said
    assert "chrf" in records.read(tmp_path / "r.jsonl")[0]["metrics"]["harness"]["generated"]
    assert engine.asked[-1]["max_tokens"] == 4


def test_windows_longer_than_the_engine_takes(model: Path, example: Path, tmp_path: Path, user_error: Refused):
    """windows that fill the context that the engine was started with: refused with the longest that it takes"""
    with serving(Engine(model, listed={"max_model_len": 32})) as url:
        said = user_error(*asking(model, url, example, tmp_path / "r.jsonl"))
    assert "windows of 31 tokens at most" in said


def test_an_engine_dies(model: Path, example: Path, tmp_path: Path, user_error: Refused):
    """an engine that fails under the questions: each is asked three times, then refused with the status, nothing written"""
    with serving(engine := Engine(model, failing=2)) as url:
        said = user_error(*asking(model, url, example, tmp_path / "r.jsonl", "endpoint.concurrency=1"))
    assert "500" in said
    assert len(engine.asked) == 2 + 3
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["kl.teacher=TEACHER"], "`kl` needs the whole distribution"),
        (["generation={}"], "`generation` times stock transformers"),
        (["dtype=bfloat16", "device=cpu"], "`device`, `dtype` has no effect with `endpoint`"),
        (["models=[a, b]"], "an `endpoint` serves one model"),
    ],
)
def test_what_an_endpoint_can_not_be_asked(model: Path, example: Path, tmp_path: Path, user_error: Refused, more: list[str], words: str):
    """`kl`, `generation`, a device, a dtype or several models with an `endpoint`: refused by name and reason"""
    assert words in user_error(*asking(model, "http://127.0.0.1:9/v1", example, tmp_path / "r.jsonl", *more))


def test_without_what_sends_requests(model: Path, example: Path, tmp_path: Path, user_error: Refused, monkeypatch: pytest.MonkeyPatch):
    """an `endpoint` where the packages that send requests are not installed: refused with the pip command"""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "tenacity":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    said = user_error(*asking(model, "http://127.0.0.1:9/v1", example, tmp_path / "r.jsonl"))
    assert "tenacity" in said
    assert "pip install 'megatron_moe2dense[eval]'" in said
