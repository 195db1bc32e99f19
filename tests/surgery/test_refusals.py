"""Every mistake a user can make with convert, score and inspect: exit 2 with found / expected / do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_moe2dense.cli import main
from megatron_moe2dense.families import dense
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.surgery.conftest import calibration
from tests.surgery.test_calibrate import damage

Refused = Callable[..., str]


@pytest.fixture
def arguments(moe: Path, statistics: Path, tmp_path: Path) -> list[str]:
    return ["convert", f"source={moe}", f"statistics={statistics}", f"output={tmp_path / 'dense'}"]


def test_a_typo_in_a_key(arguments: list[str], user_error: Refused):
    assert "did you mean 'keep'" in user_error(*arguments, "kep=4")
    assert "did you mean 'do_acp'" in user_error(*arguments, "score.method=do_apc")
    assert "scale" in user_error(*arguments, "scale={method: uniform, alpha: 2}")
    assert "importance" in user_error(*arguments, "score={method: d_optimal, importance: d_optimal}")


@pytest.mark.parametrize("file", ["single", "shard"])
def test_a_truncated_file(file: str, statistics: Path, tmp_path: Path, user_error: Refused):
    path = tiny_qwen3_moe(tmp_path / "moe", max_shard_size="100KB" if file == "shard" else "1GB")
    weights = sorted(path.glob("*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-100])
    message = user_error("convert", f"source={path}", f"statistics={statistics}", f"output={tmp_path / 'dense'}")
    assert weights.name in message
    assert "truncated" in message


def test_a_nan_expert(tokens: str, tmp_path: Path, user_error: Refused, monkeypatch: pytest.MonkeyPatch):
    """Whether it is kept or not."""
    path = tiny_qwen3_moe(tmp_path / "moe")
    main(["calibrate", *calibration(path, tokens, tmp_path / "stats")])
    # The fingerprint samples large files; a tiny one it sees whole, so take it out of the way.
    monkeypatch.setattr("megatron_moe2dense.surgery.convert.require_same_source", lambda *_: None)
    whole = (path / "model.safetensors").read_bytes()
    for expert in range(8):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        (path / "model.safetensors").write_bytes(whole)
        damage(path, name, float("nan"))
        settings = [f"source={path}", f"statistics={tmp_path / 'stats'}", f"output={tmp_path / 'dense'}"]
        message = user_error("convert", *settings, "overwrite=true")  # of what the last of these sources left
        assert name in message
        assert not (tmp_path / "dense").exists()


def test_statistics_of_another_model(arguments: list[str], statistics: Path, tmp_path: Path, user_error: Refused):
    other = tiny_qwen3_moe(tmp_path / "other", dtype="bfloat16", seed=1)
    message = user_error("convert", f"source={other}", f"statistics={statistics}", f"output={tmp_path / 'dense'}")
    assert "statistics of another model" in message
    assert "moe2dense calibrate" in message


def test_a_plan_of_another_model(arguments: list[str], tmp_path: Path, user_error: Refused):
    main(arguments)
    other = tiny_qwen3_moe(tmp_path / "other", dtype="bfloat16", seed=1)
    message = user_error("convert", f"source={other}", f"plan={tmp_path / 'dense/plan.json'}", f"output={tmp_path / 'again'}")
    assert "plan of another model" in message


def test_settings_that_would_have_no_effect(arguments: list[str], statistics: Path, tmp_path: Path, user_error: Refused):
    assert "no effect" in user_error(*arguments, "group.method=round_robin")
    assert "no effect" in user_error(*arguments, "keep=4", "groups=4", "group.method=round_robin")
    main(arguments)
    planned = [arguments[1], f"plan={tmp_path / 'dense/plan.json'}", f"output={tmp_path / 'again'}"]
    assert "plan and score" in user_error("convert", *planned, "score.method=sf")
    assert "plan and group, scale" in user_error("convert", *planned, "group.method=round_robin", "scale.method=uniform")
    assert "keep=3" in user_error("convert", *planned, "keep=3")
    main(["convert", *planned, "keep=2", "groups=2", f"statistics={statistics}"])  # what agrees is no mistake


def test_sizes_that_cannot_be(arguments: list[str], user_error: Refused):
    assert "group block" in user_error(*arguments, "keep=4")
    assert "keep >= groups" in user_error(*arguments, "keep=2", "groups=3")
    assert "keep=9" in user_error(*arguments, "keep=9", "groups=9")
    assert "keep" in user_error(*arguments, "keep=0")


def test_something_needed_is_absent(moe: Path, tokens: str, tmp_path: Path, user_error: Refused):
    output = f"output={tmp_path / 'dense'}"
    assert "statistics" in user_error("convert", f"source={moe}", output)
    assert "score" in user_error("convert", f"source={moe}", output, "statistics=x", "score=null")
    assert "config.json" in user_error("convert", f"source={tmp_path}", output, "statistics=x")
    main(["calibrate", *calibration(moe, tokens, tmp_path / "few"), "statistics=[selected_count]"])
    message = user_error("convert", f"source={moe}", f"statistics={tmp_path / 'few'}", output, "score.method=sf")
    assert "gate_sum" in message
    assert "gram" in user_error("score", f"statistics={tmp_path / 'few'}")


def test_an_existing_output_is_refused_and_overwrite_replaces_it(
    arguments: list[str], statistics: Path, tmp_path: Path, user_error: Refused
):
    main(arguments)
    before = (tmp_path / "dense/model.safetensors").read_bytes()
    assert "overwrite" in user_error(*arguments, "score.method=sf")
    assert (tmp_path / "dense/model.safetensors").read_bytes() == before
    main([*arguments, "score.method=random", "overwrite=true"])
    assert (tmp_path / "dense/model.safetensors").read_bytes() != before
    ranking = [f"statistics={statistics}", f"output={tmp_path / 'ranking.json'}"]
    main(["score", *ranking])
    assert "overwrite" in user_error("score", *ranking)
    main(["score", *ranking, "overwrite=true"])


def test_tensors_that_do_not_belong_to_the_config(tmp_path: Path, user_error: Refused):
    path = tiny_qwen3_moe(tmp_path / "moe")
    whole = load_file(path / "model.safetensors")
    router, expert = "model.layers.3.mlp.gate.weight", "model.layers.0.mlp.experts.7.up_proj.weight"
    cases = {
        "no tensor": {name: t for name, t in whole.items() if name != expert},
        "[7, 64]": {**whole, router: whole[router][:7].clone()},
        "[32, 63]": {**whole, expert: whole[expert][:, :63].clone()},
        "shared_expert": {**whole, "model.layers.2.mlp.shared_expert.up_proj.weight": whole[expert].clone()},
    }
    for text, tensors in cases.items():
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        assert text in user_error("inspect", str(path))


def test_inspect_of_what_is_no_supported_moe(moe: Path, tmp_path: Path, user_error: Refused):
    assert "drop --keep" in user_error("inspect", str(tiny_qwen3(tmp_path / "dense")), "--keep", "2")
    assert "keep=9" in user_error("inspect", str(moe), "--keep", "9")
    (tmp_path / "dense/config.json").write_text('{"model_type": "qwen33"}')
    assert "did you mean 'qwen3'" in user_error("inspect", str(tmp_path / "dense"))


def test_images_are_not_lost_unasked_where_no_class_keeps_them(tmp_path: Path, user_error: Refused, monkeypatch: pytest.MonkeyPatch):
    from tests.families.every import tiny_checkpoint

    every = dense.candidates
    monkeypatch.setattr(dense, "candidates", lambda source, exception, alone: every(source, exception, alone) if alone else ())
    moe = tiny_checkpoint(tmp_path / "moe", "qwen3_vl_moe")
    said = user_error("convert", f"source={moe}", f"statistics={tmp_path / 'stats'}", f"output={tmp_path / 'dense'}")
    assert "no stock class holds a dense qwen3_vl_moe_text inside a qwen3_vl_moe" in said
    assert "text_only=true converts the language model alone" in said


def test_statistics_and_plans_whose_gates_lack_the_factor_behind_the_experts(tmp_path: Path, user_error: Refused):
    """Earlier versions summed what the experts get, not what enters the block's output."""
    from tests.families.every import tiny_checkpoint

    moe, prefix = tiny_checkpoint(tmp_path / "moe", "beam"), write_tokens(tmp_path / "text", 64, vocab=128)
    given = [f"source={moe}", f"statistics={tmp_path / 'stats'}"]
    main(["calibrate", given[0], f"output={tmp_path / 'stats'}", f"data.path={prefix}", "data.sequence_length=16"])
    main(["convert", *given, f"output={tmp_path / 'dense'}"])
    for file in ("stats/moe2dense.json", "dense/plan.json"):
        content = json.loads((tmp_path / file).read_text())
        assert content["source"].pop("routed_factor") == 1.5
        (tmp_path / file).write_text(json.dumps(content))
    said = user_error("convert", *given, f"output={tmp_path / 'again'}")
    assert "gates with the factor 1.5" in said
    assert "moe2dense calibrate" in said
    assert "plan of an earlier version" in user_error("convert", given[0], f"plan={tmp_path}/dense/plan.json", f"output={tmp_path}/again")
