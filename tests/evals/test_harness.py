"""lm-eval on a local task, offline, against the model's own log-likelihoods."""

import builtins
import json
import os
import shutil
import tempfile
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
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals import evaluate, harness
from megatron_moe2dense.evals.config import EvalConfig, HarnessConfig
from megatron_moe2dense.evals.harness import Answers, load_tasks, task_manager
from tests.helpers.tiny_models import tiny_qwen3

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize(
    ("cache", "writable", "given", "replaced"),
    [
        ("home/.cache", True, {}, False),
        ("home/.cache", False, {}, True),
        ("~/.cache", True, {}, True),  # a user without a home
        ("filled", False, {}, False),
        ("home/.cache", False, {"HF_HOME": "elsewhere"}, False),
    ],
)
def test_the_cache_of_data_sets_is_temporary_where_home_can_not_be_written(
    cache: str, writable: bool, given: dict[str, str], replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "filled/datasets").mkdir(parents=True)
    monkeypatch.setattr(harness.constants, "HF_HOME", cache if cache.startswith("~") else str(tmp_path / cache))
    monkeypatch.setattr(os, "access", lambda *_: writable)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    harness._make_room_for_data_sets.__wrapped__()
    assert ("HF_DATASETS_CACHE" in os.environ) == replaced
    if replaced:
        assert Path(os.environ["HF_DATASETS_CACHE"]).parent == tmp_path


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


def test_what_scores_move_with_is_recorded(root, tmp_path):
    evaluate.run(config(root, tmp_path / "records.jsonl", limit=2))
    (row,) = records.read(tmp_path / "records.jsonl")
    assert row["settings"]["harness"] == {"backend": "lm-eval hf, causal", "add_bos_token": False, "max_length": 256}
    assert row["config"]["harness"]["batch_size"] == 8
    assert {"lm-eval", "transformers", "datasets"} <= set(row["versions"])


def test_bos_that_a_tokenizer_does_not_add_is_refused(root, tmp_path):
    with pytest.raises(UserError, match="begins no text with a BOS token"):
        evaluate.run(config(root, tmp_path / "records.jsonl", add_bos_token=True))


@pytest.mark.parametrize(("asked", "begins"), [(None, True), (False, False), (True, True)])
def test_bos_of_a_tokenizer_that_adds_one_is_kept_or_left_out_and_read_off(root, tmp_path, asked, begins):
    shutil.copytree(root / "model", tmp_path / "model")
    content = json.loads((tmp_path / "model/tokenizer.json").read_text())
    special = {"<eos>": {"id": "<eos>", "ids": [255], "tokens": ["<eos>"]}}
    pieces = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<eos>"}))
    wanted = config(root, tmp_path / "r.jsonl", add_bos_token=asked, limit=2).model_copy(update={"models": [str(tmp_path / "model")]})
    evaluate.run(wanted)
    assert records.read(tmp_path / "r.jsonl")[0]["settings"]["harness"]["add_bos_token"] is begins


def test_the_papers_preset_is_its_five_tasks_with_its_shots():
    preset = HarnessConfig(preset="paper")
    assert dict(preset.chosen()) == {"winogrande": 5, "hellaswag": 10, "arc_easy": 25, "arc_challenge": 25, "mmlu": 5}
    manager = task_manager(preset)
    listed = {item["metric"] for task in ("hellaswag", "arc_easy") for item in _task_yaml(manager, task)["metric_list"]}
    assert {preset.metric("hellaswag"), preset.metric("arc_easy"), preset.metric("arc_challenge")} <= listed
    assert all(task in manager.task_index for task, _ in preset.chosen())


def _task_yaml(manager, task: str) -> dict:
    text = Path(manager.task_index[task].yaml_path).read_text()
    return yaml.safe_load("\n".join(line for line in text.splitlines() if "!function" not in line))


def test_the_mean_is_over_the_metric_of_each_task():
    preset = HarnessConfig(preset="paper")
    by_task = {task: {"acc": 0.1, "acc_norm": 0.2} for task, _ in preset.chosen()}
    expected = {"winogrande": 0.1, "hellaswag": 0.2, "arc_easy": 0.2, "arc_challenge": 0.2, "mmlu": 0.1}
    assert Answers(by_task, {}).accuracy(preset) == expected


def test_data_that_can_not_be_reached_is_refused_before_any_model_is_loaded(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("a model was loaded"))
    wanted = config(root, tmp_path / "r.jsonl", tasks=None, preset="paper")
    with pytest.raises(UserError, match="bring its cache"):
        evaluate.run(wanted)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        load_tasks(HarnessConfig(tasks=["helaswag"]), Ranks())


def test_a_task_without_data_is_refused(root, tmp_path):
    task = yaml.safe_load((root / "pick.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "absent.jsonl")
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(UserError, match="a task whose data can be loaded"):
        load_tasks(HarnessConfig(tasks=[str(tmp_path / "broken.yaml")]), Ranks())


def test_shots_a_task_would_ignore_are_refused(root):
    with pytest.raises(UserError, match="which fixes them to 0"):
        load_tasks(HarnessConfig(tasks=[str(root / "pick_fixed.yaml")], shots=3), Ranks())


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
        load_tasks(HarnessConfig(tasks=["hellaswag"]), Ranks())


def test_a_dry_run_looks_up_the_questions(root, tmp_path):
    """Before hours of training: tasks and their data are there, or it is said now."""
    assert evaluate.dry_run(config(root, tmp_path / "r.jsonl", limit=5))["questions"] == {"pick": 5}
    with pytest.raises(UserError, match=r"none\.yaml"):
        evaluate.dry_run(config(root, tmp_path / "r.jsonl", tasks=[str(root / "none.yaml")]))
    assert not (tmp_path / "r.jsonl").exists()
