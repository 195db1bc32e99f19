"""What an engine says of a model, against what lm-eval's class for models of the process and the plain perplexity say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals import evaluate
from megatron_moe2dense.evals.config import EvalConfig
from megatron_moe2dense.families.tokenized import own_tokenizer
from tests.helpers.served import Engine, serving
from tests.helpers.tiny_models import tiny, tiny_qwen3

pytestmark = pytest.mark.slow

TEXTS = ["The meaning of a word is its use.", "def f(x):\n    return x + 1", "To be, or not to be", "Ünïcode, 12 345"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    """A tiny model with the tokenizer of the example and another one's BOS token."""
    folder = tiny_qwen3(tmp_path_factory.mktemp("served") / "student", vocab_size=2048, initializer_range=0.2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_directory / name, folder / name)
    return folder


def beginning_with_bos(model: Path, folder: Path) -> Path:
    """A copy whose tokenizer begins texts with token 0."""
    shutil.copytree(model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    name = next(item["content"] for item in content["added_tokens"] if item["id"] == 0)
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {name: {"id": name, "ids": [0], "tokens": [name]}}
    content["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": name, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One of each kind: a choice, the likelihood of a text, generated text. Contexts of several lengths, and an empty one."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "choices": [" word", " use", "\n"], "gold": i % 3} for i, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "text": ""}]))
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generated = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    kinds: dict[str, dict[str, Any]] = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "target_delimiter": ""},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "doc_to_text": ""},
        "generated": {"output_type": "generate_until", "doc_to_target": "{{text}}", "generation_kwargs": generated},
    }
    metrics = {"choice": ["acc"], "text": ["word_perplexity", "bits_per_byte"], "generated": ["chrf"]}
    for name, kind in kinds.items():
        data = {"test": str(folder / ("rows.jsonl" if name == "choice" else "texts.jsonl"))}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "test", "num_fewshot": 0}
        listed = [{"metric": metric} for metric in metrics[name]]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"doc_to_text": "{{text}}", **common, **kind, "metric_list": listed}))
    return [str(folder / f"{name}.yaml") for name in kinds]


def measured(output: Path, model: Path, example: Path, **settings: Any) -> dict[str, Any]:
    data = {"data": {"path": f"{example}/tokens/heldout", "sequence_length": 32, "sequences": 6}, "batch_tokens": 64}
    asked = {"models": [str(model)], "output": str(output), "perplexity": data, "overwrite": True, **settings}
    evaluate.run(build(EvalConfig, asked, "the test"))
    return records.read(output)[0]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("bos", [False, True])
def test_scores_of_an_endpoint_are_those_of_the_process(
    model: Path, tasks: list[str], example: Path, tmp_path: Path, concurrency: int, bos: bool
):
    model = beginning_with_bos(model, tmp_path / "student") if bos else model
    harness = {"tasks": tasks, "batch_size": 3}
    plain = measured(tmp_path / "plain.jsonl", model, example, harness=harness)
    with serving(engine := Engine(model)) as url:
        served = measured(tmp_path / "served.jsonl", model, example, harness=harness, endpoint={"url": url, "concurrency": concurrency})
    for task, values in plain["metrics"]["harness"].items():
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        assert numbers
        assert {name: served["metrics"]["harness"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5), task
    assert served["metrics"]["nll"] == pytest.approx(plain["metrics"]["nll"], rel=1e-5)
    assert served["metrics"]["accuracy"] == plain["metrics"]["accuracy"]
    assert all(served[name] == plain[name] for name in ("model", "fingerprint", "parameters", "tokens"))
    assert served["settings"]["harness"] == {"backend": "lm-eval local-completions", "add_bos_token": bos, "max_length": 255}
    assert served["settings"]["endpoint"] == {"url": url, "model": "student", "engine": "vllm 0.0.1"}
    assert max(len(payload["prompt"]) for payload in engine.asked) == 3


def test_prompts_are_made_by_the_tokenizer_that_the_files_describe(model: Path, tasks: list[str], example: Path, tmp_path: Path):
    """For this model_type AutoTokenizer takes another class, which cuts digits otherwise."""
    folder = tiny("qwen2", tmp_path / "student", vocab_size=2048, initializer_range=0.2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    assert any(AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != own_tokenizer(folder)(text)["input_ids"] for text in TEXTS)
    harness = {"tasks": [tasks[1]]}
    plain = measured(tmp_path / "plain.jsonl", folder, example, harness=harness)
    with serving(Engine(folder)) as url:
        served = measured(tmp_path / "served.jsonl", folder, example, harness=harness, endpoint={"url": url})
    found = (row["metrics"]["harness"]["text"]["bits_per_byte"] for row in (served, plain))
    assert next(found) == pytest.approx(next(found), rel=1e-5)


def test_scores_of_another_model_are_others(model: Path, tasks: list[str], example: Path, tmp_path: Path):
    """The comparison above can fail."""
    other = tiny_qwen3(tmp_path / "other", vocab_size=2048, initializer_range=0.3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, other / name)
    harness = {"tasks": [tasks[1]]}
    plain = measured(tmp_path / "plain.jsonl", model, example, harness=harness)
    with serving(Engine(other)) as url:
        served = measured(tmp_path / "served.jsonl", model, example, harness=harness, endpoint={"url": url})
    assert abs(served["metrics"]["nll"] - plain["metrics"]["nll"]) > 1e-2
    assert abs(served["metrics"]["harness"]["text"]["bits_per_byte"] - plain["metrics"]["harness"]["text"]["bits_per_byte"]) > 1e-2


@pytest.mark.parametrize("stride", [1, 8])
def test_a_stride_counts_the_same_positions_as_in_the_process(model: Path, example: Path, tmp_path: Path, stride: int):
    data = {"data": {"path": f"{example}/tokens/heldout", "sequence_length": 16, "sequences": 5}, "stride": stride}
    plain = measured(tmp_path / "plain.jsonl", model, example, perplexity=data)
    with serving(Engine(model)) as url:
        served = measured(tmp_path / "served.jsonl", model, example, perplexity=data, endpoint={"url": url})
    assert served["metrics"]["nll"] == pytest.approx(plain["metrics"]["nll"], rel=1e-5)
    assert served["tokens"] == plain["tokens"]


def test_a_dry_run_says_what_is_served_and_asks_nothing_more(model: Path, tasks: list[str], tmp_path: Path):
    with serving(engine := Engine(model)) as url:
        asked = {"models": [str(model)], "output": f"{tmp_path}/r.jsonl", "harness": {"tasks": tasks}, "endpoint": {"url": url}}
        found = evaluate.dry_run(build(EvalConfig, asked, "the test"))
    assert found["endpoint"] == {"url": url, "model": "student", "engine": "vllm 0.0.1"}
    assert found["questions"] == {"choice": 5, "text": 4, "generated": 4}
    assert len(engine.asked) == 1
    assert not (tmp_path / "r.jsonl").exists()


def test_an_endpoint_is_for_one_process(model: Path, tasks: list[str], tmp_path: Path):
    asked = {
        "models": [str(model)],
        "output": f"{tmp_path}/r.jsonl",
        "harness": {"tasks": tasks},
        "endpoint": {"url": "http://127.0.0.1:1/v1"},
    }
    with pytest.raises(UserError, match="endpoint in 2 processes"):
        evaluate.measure_served(build(EvalConfig, asked, "the test"), Ranks(0, 2))
