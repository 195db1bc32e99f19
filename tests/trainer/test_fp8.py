"""FP8 products: which machines are refused, which fields Megatron-Core gets, and that the teacher has none. The kernels need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import distill
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime as runtimes
from megatron_moe2dense.trainer.config import DistillConfig, Fp8Config
from megatron_moe2dense.trainer.identity import identity
from megatron_moe2dense.trainer.runtime import Runtime, fp8
from megatron_moe2dense.trainer.runtime.configs import config_of
from tests.helpers.tiny_models import tiny, write_tokens

GPU = Runtime(torch.device("cuda", 0), "nccl", transformer_engine=True)
SIZES: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "bf16": True, "params_dtype": torch.bfloat16}


def capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, minor))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_takes_the_fields_of_every_recipe(recipe: Any, monkeypatch: pytest.MonkeyPatch):
    capability(monkeypatch, 10, 0)
    config = config_of({**SIZES, **fp8.fields(Fp8Config(recipe=recipe), GPU)})
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", recipe, False)
    assert (config.fp8_amax_history_len > 1) == (recipe == "delayed")


@pytest.mark.parametrize(("recipe", "least"), [("delayed", (8, 9)), ("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))])
def test_a_gpu_that_lacks_the_recipe_is_refused(recipe: Any, least: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    capability(monkeypatch, *least)
    assert fp8.fields(Fp8Config(recipe=recipe), GPU)
    capability(monkeypatch, 8, 0)
    with pytest.raises(UserError, match=f"fp8: {recipe} on a GPU of sm_80"):
        fp8.fields(Fp8Config(recipe=recipe), GPU)


def test_without_transformer_engine_it_is_refused_and_without_the_block_nothing_changes():
    plain = Runtime(torch.device("cpu"), "gloo", transformer_engine=False)
    with pytest.raises(UserError, match="on cpu without Transformer Engine"):
        fp8.fields(Fp8Config(), plain)
    assert fp8.fields(None, plain) == {}


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    files = {"student": str(root / "student"), "teacher": str(root / "teacher"), "output": str(root / "run")}
    text = {"data": {"path": str(root / "tokens"), "sequence_length": 32}, "batch": {"micro": 1, "global": 2}, "train": {"steps": 1}}
    check = {"teacher_check": {"loss_bound": None, "stock_forward": "never"}}
    return {**files, **text, **check, **changes}


def test_float32_and_fp8_contradict_each_other(tmp_path: Path):
    with pytest.raises(UserError, match="fp8 has no effect with dtype: float32"):
        build(DistillConfig, settings(tmp_path, fp8={}, dtype="float32"), "the test")


def test_the_student_alone_computes_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fp8_margin, which nothing reads without fp8, marks the models that get the fields."""
    tiny("qwen3_moe", tmp_path / "teacher")
    tiny("qwen3", tmp_path / "student")
    write_tokens(tmp_path / "tokens", 200)
    monkeypatch.setattr(fp8, "fields", lambda config, _runtime: {"fp8_margin": 3} if config is not None else {})
    config = build(DistillConfig, settings(tmp_path, fp8={"recipe": "delayed"}), "the test")
    with runtimes.session("auto") as device, process_groups.initialized(config.parallel, seed=0) as groups:
        distill.claim_output(config)
        trainer, _ = distill.build(config, groups, device)
        teacher: Any = trainer.models.teacher
        assert [chunk.config.fp8_margin for chunk in trainer.models.student] == [3]
        assert [chunk.config.fp8_margin for chunk in teacher.chunks] == [0]
        trainer.close()


def test_a_run_begun_before_there_was_the_key_is_the_same_run(tmp_path: Path):
    tiny("qwen3_moe", tmp_path / "teacher")
    tiny("qwen3", tmp_path / "student")
    write_tokens(tmp_path / "tokens", 200)
    assert "fp8" not in identity(build(DistillConfig, settings(tmp_path), "the test"))
    assert identity(build(DistillConfig, settings(tmp_path, fp8={}), "the test"))["fp8"]["recipe"] == "tensorwise"
