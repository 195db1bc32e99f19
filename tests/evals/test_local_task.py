"""The local multiple-choice task: an exact cut of the text, and telling: the trained example answers it, a random model guesses."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals import evaluate, local_task
from megatron_moe2dense.evals.config import EvalConfig, MakeTaskConfig
from megatron_moe2dense.tokens.indexed import TokenFile
from tests.helpers.tiny_models import write_tokens

pytestmark = pytest.mark.slow

QUESTIONS, CONTEXT, LENGTH = 120, 32, 16


def config(example: Path, output: Path, **changes) -> MakeTaskConfig:
    settings = {
        "data": str(example / "tokens/heldout"),
        "tokenizer": str(example / "model"),
        "output": str(output),
        "context_tokens": CONTEXT,
        "continuation_tokens": LENGTH,
        "questions": QUESTIONS,
    }
    return build(MakeTaskConfig, {**settings, **changes}, "test")


@pytest.fixture(scope="module")
def task(example, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("task") / "local"
    local_task.run(config(example, output))
    return output


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "continuation.jsonl").read_text().splitlines()]


def test_the_answer_is_the_text_that_follows_and_every_choice_has_as_many_tokens(example, task):
    stream = TokenFile.open(str(example / "tokens/heldout"))
    tokenizer = Tokenizer.from_file(str(example / "model/tokenizer.json"))
    ends = {int(end) for end in stream.document_ends}
    assert len(rows(task)) == QUESTIONS
    for row in rows(task):
        encoded = [tokenizer.encode(row["context"] + choice).ids for choice in row["choices"]]
        assert len(set(row["choices"])) == 4
        assert all(len(ids) == CONTEXT + LENGTH for ids in encoded)
        assert all(ids[:CONTEXT] == encoded[0][:CONTEXT] for ids in encoded)
        truth = range(row["start"], row["start"] + CONTEXT + LENGTH)
        assert encoded[row["gold"]] == stream.tokens[truth.start : truth.stop].tolist()
        assert not ends & set(truth[1:])
        assert 0 not in encoded[row["gold"]], "the end of a document is no text"
    places = sorted(row["start"] for row in rows(task))
    assert all(later - earlier >= CONTEXT + LENGTH for earlier, later in itertools.pairwise(places))


def test_distractors_are_of_the_document_and_golds_are_spread(example, task):
    stream = TokenFile.open(str(example / "tokens/heldout"))
    tokenizer = Tokenizer.from_file(str(example / "model/tokenizer.json"))
    for row in rows(task)[:40]:
        end = next(end for end in stream.document_ends if end > row["start"])
        begin = max([0, *(int(other) for other in stream.document_ends if other <= row["start"])])
        document = tokenizer.decode(stream.tokens[begin:end].tolist(), skip_special_tokens=False)
        assert all(choice in document for choice in row["choices"])
    assert all(sum(row["gold"] == place for row in rows(task)) > QUESTIONS / 8 for place in range(4))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(example, task, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        local_task.run(config(example, tmp_path / name, seed=seed))
    assert (tmp_path / "same/continuation.jsonl").read_bytes() == (task / "continuation.jsonl").read_bytes()
    assert {row["start"] for row in rows(tmp_path / "other")} != {row["start"] for row in rows(task)}


def test_the_trained_example_is_far_above_chance_and_a_random_model_is_at_chance(example, task, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(example / "model"), dtype=torch.float32).save_pretrained(
        tmp_path / "random"
    )
    for file in (example / "model").glob("tokenizer*"):
        (tmp_path / "random" / file.name).write_bytes(file.read_bytes())
    settings = {
        "models": {"trained": str(example / "model"), "random": str(tmp_path / "random")},
        "output": str(tmp_path / "records.jsonl"),
        "harness": {"tasks": [str(task / "continuation.yaml")], "batch_size": 32},
    }
    evaluate.run(build(EvalConfig, settings, "test"))
    trained, random = (row["metrics"]["accuracy"]["continuation"] for row in records.read(tmp_path / "records.jsonl"))
    deviation = (0.25 * 0.75 / QUESTIONS) ** 0.5  # 0.04
    assert abs(random - 0.25) < 3 * deviation
    assert trained > 0.25 + 6 * deviation
    assert trained == pytest.approx(_plain_accuracy(example, task), abs=1e-9)


def _plain_accuracy(example: Path, task: Path) -> float:
    """By a plain loop over the choices."""
    model = AutoModelForCausalLM.from_pretrained(example / "model", dtype=torch.float32).eval()
    tokenizer, right = Tokenizer.from_file(str(example / "model/tokenizer.json")), 0
    for row in rows(task):
        ids = torch.tensor([tokenizer.encode(row["context"] + choice).ids for choice in row["choices"]])
        with torch.no_grad():
            log_probs = model(ids[:, :-1]).logits[:, CONTEXT - 1 :].log_softmax(-1)
        right += int(log_probs.gather(-1, ids[:, CONTEXT:, None]).sum((1, 2)).argmax()) == row["gold"]
    return right / QUESTIONS


def test_the_task_file_names_its_data_and_the_command_says_where_it_is(example, tmp_path, capsys):
    wanted = config(example, tmp_path / "t", questions=5, distractors="text", name="mine").model_dump(mode="json")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(wanted))
    main(["make-task", str(tmp_path / "task.yaml"), "--dry-run"])
    assert json.loads(capsys.readouterr().out)["questions_at_most"] == 5
    main(["make-task", str(tmp_path / "task.yaml")])
    assert "mine.yaml: 5 questions of 4 choices, chance 0.2500" in capsys.readouterr().out
    data = yaml.safe_load((tmp_path / "t/mine.yaml").read_text())["dataset_kwargs"]["data_files"]["test"]
    assert Path(data) == (tmp_path / "t/mine.jsonl").resolve()


def test_text_for_no_question_and_tokens_of_another_tokenizer_are_refused(example, tmp_path):
    write_tokens(tmp_path / "short", 20)
    write_tokens(tmp_path / "wide", 500, vocab=5000)
    with pytest.raises(UserError, match="not one question of 32"):
        local_task.run(config(example, tmp_path / "t", data=str(tmp_path / "short")))
    with pytest.raises(UserError, match="tokens from 0 to below 2048"):
        local_task.run(config(example, tmp_path / "u", data=str(tmp_path / "wide")))
