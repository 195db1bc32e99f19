"""What a user can get wrong in `distill` and `export`: exit 2, and a message that says found, expected, do."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense import cli
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.weights import require_one_table
from tests.helpers.quantised import fp8_blocks
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    tiny_qwen3_moe(root / "teacher")
    tiny_qwen3(root / "student")
    tiny_qwen3(root / "other vocabulary", vocab_size=300)
    write_tokens(root / "tokens", 32 * 8 + 1)
    write_tokens(root / "short", 20)
    write_tokens(root / "other tokenizer", np.arange(400), vocab=400)
    return root


def refused(command: str, capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *(f"{name.replace('__', '.')}={value}" for name, value in settings.items())])
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    assert all(part in message for part in ("found:", "expected:", "do:"))
    return message


def distill(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, **settings: Any) -> str:
    base = {
        "student": root / "student",
        "teacher": root / "teacher",
        "output": tmp_path / "run",
        "data__path": root / "tokens",
        "data__sequence_length": 32,
        "batch__micro": 2,
        "batch__global": 4,
        "train__steps": 2,
        "dtype": "float32",
    }
    return refused("distill", capsys, **{**base, **settings})


REFUSED = {
    "a typo in a key": ({"optim__learning_rat": 1}, "optim.learning_rat"),
    "a loss without its teacher": ({"teacher": "null", "loss": "{method: forward_kl}"}, "needs a teacher"),
    "a teacher the loss ignores": ({"loss": "{method: cross_entropy}"}, "does not use the teacher"),
    "balancing losses beside a teacher": ({"moe": "{aux_loss: 0.1}"}, "moe has no effect with a teacher"),
    "balancing losses for a dense student": ({"teacher": "null", "moe": "{aux_loss: 0.1}"}, "is dense"),
    "checks without a teacher": ({"teacher": "null", "teacher_check": "{loss_bound: 0.5}"}, "no effect without a teacher"),
    "routing without a teacher": ({"teacher": "null", "teacher_routing": "{active: 4}"}, "no effect without a teacher"),
    "more active experts than there are": ({"teacher_routing": "{active: 9}"}, "between 2 and 8"),
    "evaluation without text": ({"train__eval_every": 1}, "no effect without data.validation"),
    "both lengths": ({"train__tokens": 100}, "exactly one of steps and tokens"),
    "another vocabulary": ({"student": "{root}/other vocabulary"}, "teacher vocabulary 256, student vocabulary 300"),
    "tokens of another tokenizer": ({"data__path": "{root}/other tokenizer"}, "token 399"),
    "text shorter than a sample": ({"data__path": "{root}/short"}, "more than one sample of 32"),
    "too little text for the steps": ({"train__steps": 3}, "12 samples, its share of the run"),
    "validation longer than its text": ({"data__validation": "{root}/tokens", "data__validation_sequences": 50}, "at most"),
    "a batch that does not divide": ({"batch__global": 3}, "a multiple of micro x ranks = 2"),
    "processes that do not fit the layout": ({"parallel__tensor": 2}, "1 processes"),
    "a path and a blend": ({"data__blend": "[{path: a, weight: 1}, {path: b, weight: 1}]"}, "exactly one of path and blend"),
    "a source twice": ({"data__path": "null", "data__blend": "[{path: a, weight: 1}, {path: a, weight: 1}]"}, "stands twice in blend"),
    "no such token file": ({"data__path": "{root}/nothing"}, "nothing.idx"),
    "no such student": ({"student": "{root}/nothing"}, "config.json"),
    "a GPU that is not there": ({"device": "cuda"}, "no CUDA device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_distill_refuses(name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if name == "a GPU that is not there" and torch.cuda.is_available():
        return
    settings, message = REFUSED[name]
    filled = {key: value.replace("{root}", str(root)) if isinstance(value, str) else value for key, value in settings.items()}
    assert message in distill(root, capsys, tmp_path, **filled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_distill_refuses_broken_weights(value: float, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = tiny_qwen3_moe(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][1, 1] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.2.mlp.experts.3.up_proj.weight" in distill(root, capsys, tmp_path, teacher=broken)


# What is done to a tensor of a checkpoint: it is absent, of another shape, quantised, or stands beside one that nobody knows.
WRONG = {
    "model.layers.0.self_attn.k_proj.weight": (None, "no tensor 'model.layers.0.self_attn.k_proj.weight'"),
    "model.embed_tokens.weight": (torch.zeros(264, 64), "model.embed_tokens.weight is [264, 64]"),
    "model.layers.1.self_attn.o_proj.weight": (torch.zeros(64, 64).to(torch.float8_e4m3fn), "o_proj.weight is quantised (F8_E4M3)"),
    "model.layers.1.self_attn.o_proj.weight_scale_inv": (torch.ones(1, 1), "o_proj.weight_scale_inv is quantised (F32)"),
    "model.layers.1.self_attn.sinks": (torch.zeros(4), "sinks, which Qwen3"),
}


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", WRONG)
def test_every_tensor_of_both_checkpoints_is_accounted_for(
    name: str, side: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By every command that reads one."""
    tensor, said = WRONG[name]
    tensors = load_file((tiny_qwen3_moe if side == "teacher" else tiny_qwen3)(tmp_path / side) / "model.safetensors")
    tensors.pop(name, None)
    save_file({**tensors, **({} if tensor is None else {name: tensor})}, tmp_path / side / "model.safetensors", {"format": "pt"})
    assert said in distill(root, capsys, tmp_path, **{side: tmp_path / side})
    capsys.readouterr()
    assert said in refused(
        "eval", capsys, models=f"{{it: {tmp_path / side}}}", output=tmp_path / "e.jsonl", perplexity__data__path=root / "tokens"
    )
    if side == "teacher":
        assert said in refused("cache-teacher", capsys, teacher=tmp_path / side, output=tmp_path / "cache", data__path=root / "tokens")
        assert said in refused("inspect", capsys, source=tmp_path / side)


def test_a_head_of_its_own_beside_tied_embeddings(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Stock transformers keeps both tables; one model of a run would have one of them."""
    file = tiny_qwen3(tmp_path / "student", tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    said = distill(root, capsys, tmp_path, student=tmp_path / "student")
    assert "tie_word_embeddings is true, and lm_head.weight differs from model.embed_tokens.weight" in said


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_quantised_tables_are_compared_as_numbers(tmp_path: Path, factor: float):
    """Equal codes with other scales are another head."""
    file = tiny_qwen3(tmp_path / "student", tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    codes = fp8_blocks("model.embed_tokens.weight", tensors.pop("model.embed_tokens.weight"))
    head = {name.replace("model.embed_tokens", "lm_head"): tensor.clone() for name, tensor in codes.items()}
    head["lm_head.weight_scale_inv"] *= factor
    save_file({**tensors, **codes, **head}, file, {"format": "pt"})
    config = json.loads((tmp_path / "student/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "student/config.json").write_text(json.dumps(config))
    spec = ModelSpec.open(tmp_path / "student", torch.float32)
    with contextlib.nullcontext() if factor == 1.0 else pytest.raises(UserError, match="differs from"):
        require_one_table(spec)


def test_a_finished_run_is_refused_and_another_config_does_not_resume_it(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = ["student=" + str(root / "student"), f"teacher={root / 'teacher'}", f"output={tmp_path / 'run'}", f"data.path={root / 'tokens'}"]
    run += ["data.sequence_length=32", "batch.micro=2", "batch.global=4", "train.steps=1", "dtype=float32", "teacher_check.loss_bound=null"]
    cli.main(["distill", *run])
    capsys.readouterr()
    assert "is a finished output" in distill(root, capsys, tmp_path, train__steps=1)
    (tmp_path / "run" / "moe2dense.json").write_text(
        (tmp_path / "run" / "moe2dense.json").read_text().replace('"status": "finished"', '"status": "unfinished"')
    )
    assert "of another config" in distill(root, capsys, tmp_path, optim__lr=0.5)


def test_export_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "no complete checkpoint" in refused("export", capsys, checkpoint=tmp_path / "run", output=tmp_path / "out")
    (tmp_path / "folder").mkdir()
    assert "is no checkpoint" in refused("export", capsys, checkpoint=tmp_path / "folder", output=tmp_path / "out")
