"""prune-dense against slices and forward passes written out here, with models in which some parts carry nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.families.readers import for_all_readers
from megatron_moe2dense.surgery.calibrate import Job
from megatron_moe2dense.surgery.prune_dense.importance import measure
from megatron_moe2dense.surgery.prune_dense.source import DenseSource
from megatron_moe2dense.surgery.resume import Resume
from megatron_moe2dense.surgery.stream import Compute
from tests.helpers.tiny_models import tiny, write_tokens

FAMILIES = ("qwen3", "mistral", "qwen2")
HEAD = 16  # head_dim of the tiny models
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("text") / "tokens", 32 * 12, seed=3)


def prune(source: Path, output: Path, text: str, *options: str) -> Path:
    main(["prune-dense", f"source={source}", f"output={output}", f"data.path={text}", "data.sequence_length=32", *options])
    return output


def logits(directory: Path, config: dict[str, Any] | None = None) -> torch.Tensor:
    """Of the stock class, which must find exactly the tensors it has."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **(config or {}))
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens_BS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 24)))
    with torch.no_grad():
        return model(tokens_BS).logits


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Edit the weights of a checkpoint."""
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def of_heads(*heads: int) -> list[int]:
    return [head * HEAD + i for head in heads for i in range(HEAD)]


def without_heads_neurons_and_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    """Nothing comes out of heads 1 and 2, of neurons 5 to 36, and of layer 1."""
    dead = of_heads(1, 2)
    for name, tensor in tensors.items():
        if "q_proj" in name:  # sharp attention, and even attention in the dead heads: the mean of values is the shortest
            tensor *= 30
            tensor[dead] = 0
        elif "q_norm" in name:
            tensor *= 4
        elif "o_proj" in name:
            tensor[:, dead] = 0
        elif "gate_proj" in name:
            tensor[5:37] = 0
        if "layers.1." in name and ("o_proj" in name or "down_proj" in name):
            tensor.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_neurons_and_layers_that_carry_nothing_go_and_the_logits_stay(family: str, text: str, tmp_path: Path):
    source = change(tiny(family, tmp_path / "source"), without_heads_neurons_and_a_layer)
    shape = ["target.num_hidden_layers=3", "target.num_attention_heads=2", "target.intermediate_size=96"]
    output = prune(source, tmp_path / "output", text, *shape)
    heads, neurons = of_heads(0, 3), [*range(5), *range(37, 128)]
    expected = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if "layers.1." in name:
            continue
        if "q_proj" in name:
            tensor = tensor[heads]
        elif "o_proj" in name:
            tensor = tensor[:, heads]
        elif "gate_proj" in name or "up_proj" in name:
            tensor = tensor[neurons]
        elif "down_proj" in name:
            tensor = tensor[:, neurons]
        expected[name.replace("layers.2.", "layers.1.").replace("layers.3.", "layers.2.")] = tensor
    found = load_file(output / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    torch.testing.assert_close(logits(output), logits(source), rtol=1e-5, atol=1e-5)
    config = json.loads((output / "config.json").read_text())
    assert (config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]) == (HEAD, 2, 2)
    kept = json.loads((output / "kept.json").read_text())
    assert [layer["layer"] for layer in kept["layers"]] == [0, 2, 3]
    assert all(layer["heads"] == [0, 3] for layer in kept["layers"])


def test_a_group_without_values_goes_with_all_its_heads(text: str, tmp_path: Path):
    def no_values(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "v_proj" in name:
                tensor[:HEAD] = 0

    source = change(tiny("qwen3", tmp_path / "source"), no_values)
    output = prune(source, tmp_path / "output", text, "target.num_attention_heads=2", "target.num_key_value_heads=1")
    found, whole = load_file(output / WEIGHTS), load_file(source / WEIGHTS)
    for name in ("k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        assert torch.equal(found[name], whole[name][HEAD:])
    torch.testing.assert_close(logits(output), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_channels_that_carry_nothing_go_from_every_tensor(tied: bool, text: str, tmp_path: Path):
    dead = [0, 3, *range(10, 24)]

    def no_channels(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "o_proj" in name or "down_proj" in name:
                tensor[dead] = 0
            elif "embed" in name:
                tensor[:, dead] = 0

    source = change(tiny("qwen3", tmp_path / "source", tie_word_embeddings=tied), no_channels)
    output = prune(source, tmp_path / "output", text, "target.hidden_size=48")
    alive = [i for i in range(64) if i not in dead]
    found, whole = load_file(output / WEIGHTS), load_file(source / WEIGHTS)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        if "q_norm" not in name and "k_norm" not in name:
            tensor = tensor[alive] if "o_proj" in name or "down_proj" in name or tensor.ndim == 1 else tensor[:, alive]
        assert torch.equal(found[name], tensor), name

    def for_fewer_channels(tensors: dict[str, torch.Tensor]) -> None:
        """A norm divides by the root of the mean over channels: zeros lower the mean, and here they are gone."""
        for name, tensor in tensors.items():
            if "layernorm" in name or name == "model.norm.weight":
                tensor *= (64 / 48) ** 0.5

    expected, config = logits(source), json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6 * 64 / 48}))
    # q_norm and k_norm keep their head_dim; the other epsilon is below float32 there.
    torch.testing.assert_close(logits(change(output, for_fewer_channels)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_nothing_is_the_identity(family: str, text: str, tmp_path: Path):
    source = tiny(family, tmp_path / "source", dtype="bfloat16")
    (source / "tokenizer.json").write_text("{}")
    output = prune(source, tmp_path / "output", text, "target.hidden_size=64", "shard_size=100KB")
    found = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    whole = load_file(source / WEIGHTS)
    assert found.keys() == whole.keys()
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor) for name, tensor in whole.items())
    config, before = (json.loads((path / "config.json").read_text()) for path in (output, source))
    assert config == for_all_readers({**before, "head_dim": HEAD})
    assert (output / "tokenizer.json").read_text() == "{}"
    assert torch.equal(logits(output), logits(source))
    assert not [path.name for path in output.iterdir() if path.name in ("resume", "progress.json")]


@torch.no_grad()
def test_importance_equals_sums_over_the_stock_model(tmp_path: Path):
    path = tiny("qwen3", tmp_path / "source")
    windows_BS = np.random.default_rng(1).integers(0, 256, (5, 24))
    source = DenseSource.open(path)
    job = Job(Ranks(), Resume(tmp_path, [], Ranks(), 2**30))
    found = measure(source, windows_BS, Compute(torch.device("cpu"), torch.float64, 2), job)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    attended: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, inputs: attended.append(inputs[0]))
    states = model.model(torch.from_numpy(windows_BS), output_hidden_states=True).hidden_states
    for number, (layer, x_BSD, heads_BSQ) in enumerate(zip(model.model.layers, states[:4], attended[:4], strict=True)):
        middle_BSD = x_BSD + layer.self_attn.o_proj(heads_BSQ)
        seen_BSD = layer.post_attention_layernorm(middle_BSD)
        neurons_BSF = torch.nn.functional.silu(layer.mlp.gate_proj(seen_BSD)) * layer.mlp.up_proj(seen_BSD)
        after_BSD = middle_BSD + layer.mlp.down_proj(neurons_BSF)
        cosine_BS = (x_BSD * after_BSD).sum(-1) / (x_BSD.norm(dim=-1) * after_BSD.norm(dim=-1))
        expected = {
            "tokens": torch.tensor([120.0]),
            "channels": (layer.input_layernorm(x_BSD).abs() + seen_BSD.abs()).sum((0, 1)),
            "heads": heads_BSQ.unflatten(-1, (4, HEAD)).norm(dim=-1).sum((0, 1)),
            "neurons": neurons_BSF.abs().sum((0, 1)),
            "distance": (1 - cosine_BS).sum()[None],
        }
        assert found[number].sums.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[number][name], value.numpy(), rtol=1e-9, err_msg=f"{name} of layer {number}")
    np.testing.assert_allclose(found[4]["channels"], states[4].abs().sum((0, 1)).numpy(), rtol=1e-9)


def test_layers_keep_their_kind_of_attention(text: str, tmp_path: Path):
    def no_layers(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.1.{name}.weight"].zero_()

    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    source = change(tiny("qwen3", tmp_path / "source", **windows), no_layers)
    config = json.loads((source / "config.json").read_text())
    for layer_types in (config.pop("layer_types"), None):
        (source / "config.json").write_text(json.dumps(config if layer_types is None else {**config, "layer_types": layer_types}))
        output = prune(source, tmp_path / "output", text, "target.num_hidden_layers=3", "overwrite=true")
        types = json.loads((output / "config.json").read_text())["layer_types"]
        assert types == ["full_attention", "sliding_attention", "sliding_attention"]
        torch.testing.assert_close(logits(output), logits(source), rtol=1e-5, atol=1e-5)
