"""lm-eval on a local task, offline, against the model's own log-likelihoods."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals import evaluate
from megatron_moe2dense.evals.config import EvalConfig, HarnessConfig
from megatron_moe2dense.evals.harness import load_tasks
from tests.helpers.tiny_models import tiny_qwen3

WORDS = [f"w{i}" for i in range(255)]
QUESTIONS = [
    {"question": " ".join(WORDS[i : i + 4]), "choices": [WORDS[3 * i + 7], WORDS[5 * i + 40], WORDS[2 * i + 101]], "gold": i % 3}
    for i in range(24)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    tiny_qwen3(root / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<eos>"])}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(root / "model")
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, extra in (("pick", {}), ("pick_fixed", {"num_fewshot": 0})):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(root / "questions.jsonl")}},
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
            **extra,
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return root


def config(root: Path, output: Path, **harness) -> EvalConfig:
    block = {"tasks": [str(root / "pick.yaml")], **harness}
    return build(EvalConfig, {"models": [str(root / "model")], "output": str(output), "harness": block}, "test")


def test_accuracy_of_a_local_task_is_that_of_the_models_log_likelihoods(root, tmp_path, capsys):
    evaluate.run(config(root, tmp_path / "records.jsonl"))
    (row,) = records.read(tmp_path / "records.jsonl")
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64).eval()
    number = {word: i for i, word in enumerate(WORDS)}
    with torch.no_grad():
        prompts = torch.tensor([[number[word] for word in question["question"].split()] for question in QUESTIONS])
        scores = model(prompts).logits[:, -1].numpy()
    best = [int(np.argmax([scores[i, number[choice]] for choice in question["choices"]])) for i, question in enumerate(QUESTIONS)]
    expected = float(np.mean([choice == question["gold"] for choice, question in zip(best, QUESTIONS, strict=True)]))
    assert row["metrics"]["accuracy"] == {"pick": pytest.approx(expected)}
    assert row["metrics"]["harness"]["pick"]["shots"] == 0
    assert 0 < expected < 1
    assert "pick" in capsys.readouterr().out


def test_shots_and_limit_reach_lm_eval(root, tmp_path):
    evaluate.run(config(root, tmp_path / "records.jsonl", shots={str(root / "pick.yaml"): 2}, limit=5))
    (row,) = records.read(tmp_path / "records.jsonl")
    assert row["metrics"]["harness"]["pick"]["shots"] == 2
    assert row["metrics"]["accuracy"]["pick"] * 5 == pytest.approx(round(row["metrics"]["accuracy"]["pick"] * 5))


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        load_tasks(HarnessConfig(tasks=["helaswag"]))


def test_a_task_without_data_is_refused(root, tmp_path):
    task = yaml.safe_load((root / "pick.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "absent.jsonl")
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(UserError, match="a task whose data can be loaded"):
        load_tasks(HarnessConfig(tasks=[str(tmp_path / "broken.yaml")]))


def test_shots_a_task_would_ignore_are_refused(root):
    with pytest.raises(UserError, match="which fixes them to 0"):
        load_tasks(HarnessConfig(tasks=[str(root / "pick_fixed.yaml")], shots=3))


def test_a_model_without_tokenizer_is_refused(root, tmp_path):
    tiny_qwen3(tmp_path / "bare")
    wanted = config(root, tmp_path / "r.jsonl").model_copy(update={"models": [str(tmp_path / "bare")]})
    with pytest.raises(UserError, match="a tokenizer beside the weights"):
        evaluate.run(wanted)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"megatron_moe2dense\[eval\]"):
        load_tasks(HarnessConfig(tasks=["hellaswag"]))
