"""The shapes prune-dense takes and chooses, which parts it keeps, what it refuses, what its dry run says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery.prune_dense.config import PruneTarget
from megatron_moe2dense.surgery.prune_dense.importance import best, choose
from megatron_moe2dense.surgery.prune_dense.shape import target_shape
from megatron_moe2dense.surgery.prune_dense.source import DenseSource
from megatron_moe2dense.surgery.prune_dense.write import steps_of
from megatron_moe2dense.surgery.stats import LayerStats
from tests.families.published import QWEN3_32B
from tests.helpers.tiny_models import tiny, tiny_qwen3, write_tokens


def on_meta(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stock class's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**config), dtype=torch.bfloat16)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def published(config: dict[str, object]) -> DenseSource:
    """A source of a public config, without weights."""
    tensors = {name: TensorInfo(name, Path("none"), "BF16", shape, 0, 0) for name, shape in on_meta(config).items()}
    return DenseSource.of(CheckpointIndex(Path("none"), config, tensors))


def test_qwen3_32b_has_the_papers_parameters_in_the_papers_shape():
    source = published(QWEN3_32B)
    assert source.parameters(source.shape) == 32_762_123_264
    target = PruneTarget(hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=8, intermediate_size=6144)
    shape = target_shape(source, target)
    specs = {spec.name: spec for step in steps_of(source, shape) for _, spec in step}
    stock = on_meta(source.smaller_config(shape, range(48)))
    assert {name: spec.shape for name, spec in specs.items()} == stock
    assert sum(spec.parameters for spec in specs.values()) == source.parameters(shape) == 3_441_113_088


def test_a_budget_gives_the_largest_shape_in_proportion():
    source = published(QWEN3_32B)
    own = source.shape
    for budget in (3_441_113_088, 8_000_000_000, 32_000_000_000):
        shape = target_shape(source, PruneTarget(parameters=budget))
        assert 0.95 * budget < source.parameters(shape) <= budget
        ratio = shape.hidden_size / own.hidden_size
        assert shape.hidden_size % 64 == shape.intermediate_size % 64 == 0
        assert shape.num_key_value_heads == own.num_key_value_heads
        assert shape.num_hidden_layers == pytest.approx(ratio * own.num_hidden_layers, abs=0.5)
        assert shape.num_attention_heads == pytest.approx(ratio * own.num_attention_heads, abs=4)
        assert ratio * own.intermediate_size - 32 <= shape.intermediate_size <= own.intermediate_size
    assert target_shape(source, PruneTarget(parameters=3_441_113_088)) == target_shape(source, PruneTarget(parameters=3_441_113_088))


def test_equal_importance_keeps_what_comes_first_and_groups_stay_whole(tmp_path: Path):
    assert best(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 2]
    assert best(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 2, 3, 4]
    source = DenseSource.open(tiny_qwen3(tmp_path / "source"))
    shape = target_shape(source, PruneTarget(num_hidden_layers=2, num_attention_heads=2, intermediate_size=3))
    stats = {
        layer: LayerStats(
            {
                "tokens": np.ones(1),
                "channels": np.ones(64),
                "heads": np.array([9.0, 8.0, 1.0, 2.0]),  # the two best are of one group; each group keeps its own best
                "neurons": np.arange(128) % 3 * 1.0,
                "distance": np.array([[1.0], [3.0], [1.0], [2.0]][layer]),
            }
        )
        for layer in range(4)
    }
    kept = choose(source, {**stats, 4: LayerStats({"channels": np.ones(64)})}, shape)
    assert [layer.number for layer in kept.layers] == [1, 3]
    assert kept.layers[0].heads.tolist() == [0, 3]
    assert kept.layers[0].kv_heads.tolist() == [0, 1]
    assert kept.layers[0].neurons.tolist() == [2, 5, 8]
    assert kept.channels_D.tolist() == list(range(64))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("dense")
    text = write_tokens(folder / "tokens", 32 * 4)
    source = tiny_qwen3(folder / "source")
    return ["prune-dense", f"source={source}", f"output={folder / 'output'}", f"data.path={text}", "data.sequence_length=32"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["target.hidden_size=128"], "target.hidden_size=128"),
        (["target.num_hidden_layers=5"], "at most 4, the source's"),
        (["target.num_attention_heads=3"], "3 query heads for 2"),
        (["target.num_key_value_heads=1"], "set target.num_attention_heads to at most 2"),
        (["target.hidden_size=0"], "greater than 0"),
        (["target={}"], "no size and no number of parameters"),
        (["target.parameters=1000", "target.hidden_size=32"], "one of the two"),
        (["target.hidden_size=32", "target.multiple=8"], "multiple has no effect"),
        (["target.parameters=10000000"], "there is nothing to prune"),
        (["target.parameters=1000", "target.multiple=8"], "raise it, lower target.multiple"),
        (["target.parameters=100000", "target.multiple=100"], "multiple of at most 64"),
        (["target.hidden=32"], "did you mean 'hidden_size'"),
        ([], "target: required"),
        (["target.hidden_size=32", "device=nowhere"], "device 'nowhere'"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(options: list[str], words: str, arguments: list[str], user_error: Callable[..., str]):
    assert words in user_error(*arguments, *options)
    assert not Path(arguments[2].removeprefix("output=")).exists()


def test_models_that_can_not_be_pruned_are_refused_by_name(arguments: list[str], user_error: Callable[..., str], tmp_path: Path):
    for family in ("qwen3_moe", "gpt_oss", "olmoe", "deepseek_v2"):
        source = tiny(family, tmp_path / family)
        message = user_error(*arguments, f"source={source}", "target.hidden_size=32")
        assert f"a {family} model" in message
        assert "qwen3, mistral, qwen2" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}), "mlp.extra.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}), "model.norm.weight is [63]"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "quantised (I8)"),
        (lambda tensors: tensors.pop("lm_head.weight"), "no tensor 'lm_head.weight'"),
        (lambda tensors: tensors["lm_head.weight"].fill_(float("nan")), "lm_head.weight has NaN"),
        (lambda tensors: tensors["model.embed_tokens.weight"].fill_(float("inf")), "model.embed_tokens.weight has"),
    ],
    ids=["unknown", "shape", "quantised", "missing", "nan", "infinite"],
)
def test_damaged_sources_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, arguments: list[str], user_error: Callable[..., str], tmp_path: Path
):
    source = tiny_qwen3(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = user_error(*arguments, f"source={source}", f"output={tmp_path / 'output'}", "target.num_hidden_layers=2")
    assert words in message


def test_tokens_of_another_tokenizer_are_refused(arguments: list[str], user_error: Callable[..., str], tmp_path: Path):
    text = write_tokens(tmp_path / "tokens", 64, vocab=5000)
    assert "the model's vocabulary of 256" in user_error(*arguments, f"data.path={text}", "target.hidden_size=32")


def test_a_dry_run_says_shape_bytes_and_parameters_and_writes_nothing(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    output = tmp_path / "output"
    options = ["target.parameters=100000", "target.multiple=8", f"output={output}"]
    main([*arguments, *options, "--dry-run"])
    facts = json.loads(capsys.readouterr().out)
    assert not output.exists()
    main([*arguments, *options])
    printed = capsys.readouterr().out
    source = DenseSource.open(output)
    assert facts["shape"] == asdict(source.shape)
    assert facts["parameters"]["output"] == source.parameters(source.shape) <= 100_000
    assert facts["writes"][str(output)] == source.index.nbytes
    assert f"{facts['parameters']['output']:,} of {facts['parameters']['source']:,} parameters" in printed
    assert json.loads((output / "moe2dense.json").read_text())["shape"] == facts["shape"]
    assert facts["flops"] > 2 * facts["data"]["tokens"] * 4 * 3 * 64 * 128
    assert all(value > 0 for value in facts["memory_bytes"].values())
