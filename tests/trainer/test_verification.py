"""A teacher that is not what transformers makes of its files, or predicts nothing, trains nobody."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import MANIFEST
from megatron_moe2dense.families import FAMILIES, WeightRule
from megatron_moe2dense.families.ffn import FfnPlace
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.trainer import distill, identity
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.verification import stock, verify
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

pytestmark = pytest.mark.slow

RANDOM = {"loss_bound": None}  # what a teacher with random weights needs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verification")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", 32 * 8 + 1)
    return root


@pytest.fixture(scope="module")
def pico(root: Path, example: Path) -> dict[str, Any]:
    """Settings for the trained example as the teacher."""
    student = tiny_qwen3(root / "student of pico", vocab_size=2048)
    data = {"path": str(example / "tokens/distill"), "sequence_length": 128}
    return {"student": str(student), "teacher": str(example / "model"), "data": data, "batch": {"micro": 1, "global": 1}}


def run(root: Path, output: Path, check: dict[str, Any] | None = RANDOM, **settings: Any) -> dict[str, Any]:
    """Train one step; what the manifest says of the teacher."""
    base = {
        "student": str(root / "student"),
        "teacher": str(root / "teacher"),
        "output": str(output),
        "data": {"path": str(root / "tokens"), "sequence_length": 32},
        "batch": {"micro": 2, "global": 4},
        "train": {"steps": 1},
        "teacher_check": check,
        "dtype": "float32",
    }
    distill.run(build(DistillConfig, {**base, **settings}, "the test"))
    return json.loads((output / MANIFEST).read_text())["teacher"]


def unfinish(output: Path) -> None:
    """As if the run had been killed after its last checkpoint."""
    manifest = json.loads((output / MANIFEST).read_text())
    (output / MANIFEST).write_text(json.dumps({**manifest, "status": "unfinished"}))


def test_the_losses_recorded_are_those_of_stock_transformers(root: Path, tmp_path: Path):
    found = run(root, tmp_path / "run")
    assert found["stock_kl"] < 1e-6
    assert found["stock_loss"] == pytest.approx(found["loss_there"], rel=1e-5)
    assert found["loss"] == pytest.approx(found["loss_there"], rel=1e-6)  # the whole sample was compared


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_a_trained_teacher_passes_all_checks(dtype: str, most: float, pico: dict[str, Any], tmp_path: Path):
    found = run(tmp_path, tmp_path / "run", None, dtype=dtype, **pico)
    assert found["loss"] < 0.6 * math.log(2048)
    assert found["stock_kl"] < most


def test_expanded_routing_is_compared_with_expanded_routing(root: Path, tmp_path: Path):
    found = run(root, tmp_path / "run", teacher_routing={"active": 4})
    assert found["stock_kl"] < 1e-6
    assert found["stock_loss"] != pytest.approx(run(root, tmp_path / "plain")["stock_loss"], rel=1e-4)


def test_a_random_teacher_is_refused(root: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"a uniform guess has 5\.5452"):
        run(root, tmp_path / "run", None)


def test_a_teacher_of_zeros_is_refused(root: Path, tmp_path: Path):
    zeroed = tiny_qwen3_moe(tmp_path / "zeroed")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(zeroed / "model.safetensors").items()}
    save_file(tensors, zeroed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"loss 5\.5452 .* a uniform guess has 5\.5452"):
        run(root, tmp_path / "run", None, teacher=str(zeroed))


def swapped_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of queries at the place of that of keys, and the other way round."""
    family = FAMILIES["qwen3_moe"]
    other = {"q_layernorm.weight": "k_norm", "k_layernorm.weight": "q_norm"}

    def swapped(rule: WeightRule) -> WeightRule:
        name = other.get(rule.megatron.rpartition(".self_attention.")[2])
        return rule if name is None else replace(rule, made_of=(f"model.layers.{{layer}}.self_attn.{name}.weight",))

    monkeypatch.setitem(FAMILIES, "qwen3_moe", replace(family, attention=tuple(swapped(rule) for rule in family.attention)))


def swapped_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    read = FfnPlace.read_part
    monkeypatch.setattr(FfnPlace, "read_part", lambda *arguments: read(*arguments)[::-1])


def another_rotary_base(monkeypatch: pytest.MonkeyPatch) -> None:
    dims: Any = Stock.__dict__["dims"]
    monkeypatch.setattr(Stock, "dims", property(lambda stock: replace(dims.func(stock), rope_theta=100.0)))


@pytest.mark.parametrize("fault", [swapped_norms, swapped_gate_and_up, another_rotary_base])
def test_a_wrong_name_table_or_architecture_is_refused(
    fault: Callable[[pytest.MonkeyPatch], None], pico: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a trained teacher: random weights hardly use their attention. In bfloat16, which has the wider bound."""
    fault(monkeypatch)
    with pytest.raises(UserError, match="to the stock transformers forward"):
        run(tmp_path, tmp_path / "run", None, dtype="bfloat16", **pico)


def test_an_unknown_layout_of_weights_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What stock transformers can not load can not be compared; the way out is in the message."""

    def refuses(*_args: Any, **_options: Any) -> None:
        raise ValueError("no such class")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuses)
    with pytest.raises(UserError, match="no such class") as error:
        run(root, tmp_path / "run")
    assert "stock_forward=never" in error.value.do
    assert run(root, tmp_path / "run", {**RANDOM, "stock_forward": "never"})["stock_kl"] is None


def test_a_tensor_that_transformers_misses_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loads: Any = AutoModelForCausalLM.from_pretrained

    def incomplete(*args: Any, **options: Any) -> Any:
        model, info = loads(*args, **options)
        return model, {**info, "missing_keys": {"lm_head.weight"}}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", incomplete)
    with pytest.raises(UserError, match="misses lm_head"):
        run(root, tmp_path / "run")


def test_a_teacher_too_large_for_host_memory_is_compared_only_on_request(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "free_memory", lambda: 1000)
    assert run(root, tmp_path / "auto")["stock_kl"] is None
    assert run(root, tmp_path / "always", {**RANDOM, "stock_forward": "always"})["stock_kl"] < 1e-6


def test_a_resumed_run_repeats_no_forward_pass_and_refuses_another_teacher(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = tiny_qwen3_moe(tmp_path / "teacher", seed=1)
    first = run(root, tmp_path / "run", teacher=str(teacher))

    def never(*_args: Any) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr(stock, "logits", never)
    unfinish(tmp_path / "run")
    assert run(root, tmp_path / "run", None, teacher=str(teacher)) == first
    unfinish(tmp_path / "run")
    tiny_qwen3_moe(tmp_path / "teacher", seed=3)
    with pytest.raises(UserError, match=r"another config \(teacher: "):
        run(root, tmp_path / "run", teacher=str(teacher))
    # a change that no sample of the quick fingerprint meets is met by the sums over every value
    monkeypatch.setattr(identity.CheckpointIndex, "fingerprint", lambda _index: "the same")
    begun = json.loads((tmp_path / "run/moe2dense.json").read_text())
    begun["identity"] |= {"student": "the same", "teacher": "the same"}
    (tmp_path / "run/moe2dense.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match=f"this run began with {first['fingerprint']}"):
        run(root, tmp_path / "run", teacher=str(teacher))
