"""The eval command: rows, resuming, refusals, what a dry run tells."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals import evaluate
from megatron_moe2dense.evals.config import EvalConfig
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    tiny_qwen3_moe(root / "moe")
    tiny_qwen3(root / "dense", seed=1)
    (root / "dense/moe2dense.json").write_text(json.dumps({"plan_hash": "abc"}))
    write_tokens(root / "held_out", 16 * 9 + 5)
    write_tokens(root / "other", 16 * 4, seed=8)
    return root


def config(root: Path, output: Path, **changes) -> EvalConfig:
    data = {
        "models": {"teacher": str(root / "moe"), "student": str(root / "dense")},
        "output": str(output),
        "perplexity": {"data": {"path": str(root / "held_out"), "sequence_length": 16}, "batch_tokens": 64},
        "kl": {"teacher": str(root / "moe")},
        **changes,
    }
    return build(EvalConfig, data, "test")


def test_rows_hold_metrics_plan_config_and_versions(root, tmp_path, capsys):
    wanted = config(root, tmp_path / "records.jsonl")
    evaluate.run(wanted)
    teacher, student = records.read(tmp_path / "records.jsonl")
    assert [teacher["model"], student["model"]] == ["teacher", "student"]
    assert teacher["metrics"]["kl"] == 0.0
    assert teacher["metrics"]["top1_agreement"] == 1.0
    assert student["metrics"]["kl"] > 0.01
    assert student["tokens"] == 9 * 15
    assert teacher["plan_hash"] is None
    assert student["plan_hash"] == "abc"
    assert student["config"] == wanted.model_dump(mode="json")
    assert {"torch", "transformers", "megatron_moe2dense", "lm-eval"} <= set(student["versions"])
    table = capsys.readouterr().out
    assert f"{student['metrics']['perplexity']:.4f}" in table
    assert "KL(teacher||model) [nats]" in table


def test_an_interrupted_run_continues_where_it_stopped(root, tmp_path):
    output = tmp_path / "records.jsonl"
    evaluate.run(config(root, output))
    first, second = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(first + second[:20])  # killed while writing the second row
    evaluate.run(config(root, output))
    after = records.read(output)
    assert output.read_bytes().startswith(first)
    assert after[1]["metrics"] == json.loads(second)["metrics"]
    assert len(after) == 2


def test_finished_foreign_or_changed_rows_are_not_mixed(root, tmp_path):
    output = tmp_path / "records.jsonl"
    evaluate.run(config(root, output))
    with pytest.raises(UserError, match="finished output"):
        evaluate.run(config(root, output))
    with pytest.raises(UserError, match="another evaluation"):
        evaluate.run(config(root, output, dtype="bfloat16"))
    rows = records.read(output)
    records.rewrite(output, [{**rows[0], "fingerprint": "0"}])
    with pytest.raises(UserError, match="has changed since"):
        evaluate.run(config(root, output))
    evaluate.run(config(root, output, overwrite=True))
    assert [row["metrics"] for row in records.read(output)] == [row["metrics"] for row in rows]


def test_kl_data_of_its_own_leaves_the_perplexity_alone(root, tmp_path):
    other = {"path": str(root / "other"), "sequence_length": 16}
    evaluate.run(config(root, tmp_path / "both.jsonl"))
    evaluate.run(config(root, tmp_path / "own.jsonl", kl={"teacher": str(root / "moe"), "data": other}))
    whole = {"data": other, "batch_tokens": 64}
    evaluate.run(config(root, tmp_path / "other.jsonl", perplexity=whole))
    both, own, alone = (records.read(tmp_path / f"{name}.jsonl")[1] for name in ("both", "own", "other"))
    assert own["metrics"]["nll"] == both["metrics"]["nll"]
    assert own["metrics"]["kl"] == alone["metrics"]["kl"] != both["metrics"]["kl"]
    assert own["tokens"] == 9 * 15 + 4 * 15


def test_without_a_teacher_there_is_no_kl(root, tmp_path, capsys):
    evaluate.run(config(root, tmp_path / "records.jsonl", kl=None))
    assert set(records.read(tmp_path / "records.jsonl")[0]["metrics"]) == {"nll", "perplexity"}
    assert "KL" not in capsys.readouterr().out


def test_models_of_a_list_are_called_by_their_folder(root, tmp_path):
    wanted = config(root, tmp_path / "r.jsonl", models=[str(root / "moe") + "/", str(root / "dense")])
    assert list(wanted.directories()) == ["moe", "dense"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["a/x", "b/x"]}, "two models are called x"),
        ({"models": []}, "`models` is empty"),
        ({"perplexity": None, "kl": None}, "nothing to measure"),
        ({"perplexity": None, "harness": {"tasks": ["t"]}}, "`kl` goes with `perplexity`"),
        ({"perplexity": {"data": {"path": "t", "sequence_length": 16}, "stride": 16}}, "leaves no context in windows of 16"),
        ({"harness": {"preset": "paper", "tasks": ["t"]}}, "either `preset` or `tasks`"),
        ({"harness": {"limit": 3}}, "either `preset` or `tasks`"),
        ({"harness": {"preset": "paper", "shots": 5}}, "`shots` are the preset's"),
        ({"perplexity": None, "kl": None, "generation": {}}, "`generation` needs prompts"),
        ({"generation": {"batch": [2, 2]}}, "different positive numbers"),
        ({"device_map": "auto", "device": "cpu"}, "no effect with device_map"),
        ({"harness": {"tasks": ["t"], "shots": {"u": 1}}}, "not a task: \\['u'\\], without shots: \\['t'\\]"),
        ({"harness": {"tasks": ["t"], "shots": -1}}, "must not be negative"),
    ],
)
def test_settings_that_do_not_fit_are_refused(root, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(root, tmp_path / "r.jsonl", **changes)


def test_a_stride_counts_the_last_tokens_of_every_window_in_the_command_too(root, tmp_path):
    data = {"path": str(root / "held_out"), "sequence_length": 16}
    evaluate.run(config(root, tmp_path / "r.jsonl", perplexity={"data": data, "stride": 4, "batch_tokens": 64}))
    rows = records.read(tmp_path / "r.jsonl")
    assert [row["tokens"] for row in rows] == [4 * ((16 * 9 + 5 - 16) // 4 + 1)] * 2
    assert rows[0]["metrics"]["kl"] == 0.0


def test_generation_is_recorded_with_what_it_depends_on(root, tmp_path, capsys):
    wanted = {"prompt_tokens": 8, "new_tokens": 4, "batch": [1, 3], "repeats": 1}
    evaluate.run(config(root, tmp_path / "r.jsonl", kl=None, generation=wanted))
    rows = records.read(tmp_path / "r.jsonl")
    assert [item["batch"] for item in rows[1]["metrics"]["generation"]] == [1, 3]
    assert {"device": "cpu", "dtype": "float32", "attention": "sdpa"}.items() <= rows[0]["settings"].items()
    assert "decode, batch 3 [tokens/s]" in capsys.readouterr().out


def test_too_few_prompts_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="9 prompts of 16 tokens"):
        evaluate.run(config(root, tmp_path / "r.jsonl", generation={"prompt_tokens": 16, "batch": [10]}))


def test_a_device_map_loads_through_accelerate_and_measures_the_same(root, tmp_path, monkeypatch):
    asked = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k.get("device_map")) or real(*a, **k))
    evaluate.run(config(root, tmp_path / "one.jsonl"))
    evaluate.run(config(root, tmp_path / "spread.jsonl", device_map="balanced"))
    assert asked == [None, None, "balanced", "balanced"]  # the teacher among the models is loaded once
    one, spread = (records.read(tmp_path / f"{name}.jsonl")[1]["metrics"] for name in ("one", "spread"))
    assert spread == pytest.approx(one, rel=1e-6)


def test_a_model_of_another_vocabulary_is_refused_before_anything_runs(root, tmp_path):
    tiny_qwen3(tmp_path / "wide", vocab_size=300)
    with pytest.raises(UserError, match="vocabulary of 300, the teacher 256"):
        evaluate.run(config(root, tmp_path / "r.jsonl", models=[str(tmp_path / "wide")]))


def test_tokens_beyond_the_vocabulary_are_refused(root, tmp_path):
    write_tokens(tmp_path / "wide", 64, vocab=1000)
    wide = {"data": {"path": str(tmp_path / "wide"), "sequence_length": 16}}
    with pytest.raises(UserError, match="below the model's vocabulary of 256"):
        evaluate.run(config(root, tmp_path / "r.jsonl", perplexity=wide))


def test_the_command_reads_yaml_and_exits_2_on_a_users_error(root, tmp_path, capsys):
    (tmp_path / "eval.yaml").write_text(json.dumps(config(root, tmp_path / "records.jsonl").model_dump(mode="json")))
    main(["eval", str(tmp_path / "eval.yaml")])
    assert "student" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(tmp_path / "eval.yaml")])
    assert stop.value.code == 2
    assert "overwrite=true" in capsys.readouterr().err


def test_a_dry_run_counts_active_parameters_and_writes_nothing(root, tmp_path):
    facts = evaluate.dry_run(config(root, tmp_path / "records.jsonl"))
    assert not (tmp_path / "records.jsonl").exists()
    assert facts["models_to_measure"] == ["teacher", "student"]
    attention = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 2 * 16 + 2 * 64) + 64 + 2 * 256 * 64
    moe, dense = attention + 4 * (8 * 64 + 2 * 3 * 64 * 32), attention + 4 * 3 * 64 * 128
    assert facts["forward_flops"] == 2 * 144 * (moe + dense + 2 * moe)
    assert facts["tokens_per_model"] == 144
