"""Loading refuses everything that is not the complete model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.device import open_device
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals.models import load_model, vocab_size
from tests.families.every import tiny_checkpoint, tiny_model
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe

NORM = "model.layers.1.post_attention_layernorm.weight"


def load(directory: Path):
    return load_model(CheckpointIndex.open(directory), torch.device("cpu"), "float32")


def edit(directory: Path, change) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_weights_on_disk_are_the_weights_in_memory(tmp_path):
    model = load(tiny_qwen3(tmp_path / "m"))
    tensors = load_file(tmp_path / "m/model.safetensors")
    assert torch.equal(model.state_dict()[NORM], tensors[NORM])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_embeddings_are_complete_without_a_head_tensor(tmp_path):
    directory = tiny_qwen3(tmp_path / "m", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    load(directory)


def test_a_class_that_the_auto_classes_do_not_list_is_loaded_by_its_architecture(tmp_path):
    """Mistral4ForCausalLM: AutoModelForCausalLM does not know its config."""
    directory = tiny_checkpoint(tmp_path / "m", "mistral4")
    model = load(directory)
    assert type(model).__name__ == "Mistral4ForCausalLM"
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        # equal weights; memory that is aligned otherwise rounds otherwise on some CPUs
        torch.testing.assert_close(model(input_ids=tokens).logits, tiny_model("mistral4")(input_ids=tokens).logits)


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path):
    config = T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="T5ForConditionalGeneration"):
        load(tmp_path / "m")


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    directory = edit(tiny_qwen3(tmp_path / "m"), lambda tensors: tensors.pop(NORM))
    with pytest.raises(UserError, match=f"1 missing keys, first {NORM}"):
        load(directory)


def test_a_missing_expert_is_refused(tmp_path):
    directory = edit(tiny_qwen3_moe(tmp_path / "m"), lambda tensors: tensors.pop("model.layers.2.mlp.experts.5.up_proj.weight"))
    with pytest.raises(UserError, match="stock transformers loads"):
        load(directory)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.5.up_proj.weight"),  # one of a stack in memory
        ("aria", "language_model.model.layers.3.input_layernorm.weight"),  # model.language_model. in memory
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias"),  # a buffer
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_its_name_in_the_files(model_type: str, name: str, tmp_path):
    directory = edit(tiny_checkpoint(tmp_path / "m", model_type), lambda tensors: tensors[name].view(-1)[3:4].fill_(torch.nan))
    with pytest.raises(UserError, match=f"safetensors: {name} has 1 NaN or infinite"):
        load(directory)


def test_a_left_over_tensor_is_refused(tmp_path):
    directory = edit(tiny_qwen3(tmp_path / "m"), lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(UserError, match="1 unexpected keys, first extra"):
        load(directory)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    directory = edit(tiny_qwen3(tmp_path / "m"), lambda tensors: tensors.update({NORM: torch.zeros(65)}))
    with pytest.raises(UserError, match="mismatched keys"):
        load(directory)


def test_an_unknown_architecture_is_refused(tmp_path):
    directory = tiny_qwen3(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with pytest.raises(UserError, match="stock transformers"):
        load(directory)


def test_a_config_without_vocabulary_is_refused(tmp_path):
    index = CheckpointIndex.open(tiny_qwen3(tmp_path / "m"))
    index.config.pop("vocab_size")
    with pytest.raises(UserError, match="vocab_size None"):
        vocab_size(index)


@pytest.mark.parametrize("name", ["cuda:99", "tpu?"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="a device of this machine"):
        open_device(name, Ranks())


def test_a_model_for_images_around_a_language_model_is_one_of_text(tmp_path):
    directory = tiny_checkpoint(tmp_path / "m", "qwen3_vl_moe")
    assert type(load(directory)).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert vocab_size(CheckpointIndex.open(directory)) == 128
