"""The tiny models of every mixture-of-experts type against the stock classes that they are made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.every import (
    IMAGE_AND_TEXT,
    as_in_memory,
    experts_modules,
    moe_types,
    source_of,
    stock_class,
    tiny_checkpoint,
    tiny_model,
    wrapper_types,
)

pytestmark = pytest.mark.slow

TOKENS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=moe_types() + wrapper_types())
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type)


@pytest.fixture(scope="module")
def logits(model: PreTrainedModel) -> torch.Tensor:
    return _logits(model)


@pytest.fixture(scope="module")
def checkpoint(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every") / "model"
    model.save_pretrained(folder)
    return folder


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def _equal(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    saved, loaded = model.state_dict(), other.state_dict()
    return saved.keys() == loaded.keys() and all(tensor.equal(loaded[name]) for name, tensor in saved.items())


def test_all_types_that_use_the_experts_interface_are_found():
    assert len(moe_types()) >= 50
    assert len(wrapper_types()) >= 20
    assert not set(moe_types()) & set(wrapper_types())
    found = {stock_class(model_type).__name__ for model_type in moe_types() + wrapper_types()}
    listed = {name for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *IMAGE_AND_TEXT.values()) if isinstance(name, str)}
    using = {name for name in listed if "@use_experts_implementation" in source_of(name)}
    assert using - found == {name for name in using if name.endswith("ForBlockDiffusion")}


def test_the_checkpoint_loads_in_the_stock_class(model_type: str, model: PreTrainedModel, checkpoint: Path, logits: torch.Tensor):
    loaded, report = stock_class(model_type).from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values()), report
    assert _equal(model, loaded)
    assert logits.shape == (2, 12, 128)
    assert logits.isfinite().all()
    torch.testing.assert_close(_logits(loaded), logits)  # equal weights; memory that is aligned otherwise rounds otherwise on some CPUs


def test_the_layout_in_memory_loads_in_the_stock_class(model_type: str, checkpoint: Path, model: PreTrainedModel, tmp_path: Path):
    folder = as_in_memory(checkpoint, tmp_path / "model")
    assert set(load_file(folder / "model.safetensors")) <= set(model.state_dict())
    loaded, report = stock_class(model_type).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert _equal(model, loaded)


def test_every_layer_with_experts_uses_several(model: PreTrainedModel):
    called: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_hook(lambda _, arguments, __, name=name: called.setdefault(name, []).extend(_experts(arguments)))
        for name, module in experts_modules(model).items()
    ]
    _logits(model)
    for hook in hooks:
        hook.remove()
    assert called.keys() == experts_modules(model).keys() != set()
    assert all(len(set(experts)) > 2 for experts in called.values() if experts)


def _experts(arguments: tuple[torch.Tensor, ...]) -> list[int]:
    """Where the module gets (x, experts, gates), as in the experts interface: the experts, of each token."""
    return arguments[1].flatten().tolist() if len(arguments) == 3 else []


def test_no_choice_hangs_on_a_rounding(model: PreTrainedModel, logits: torch.Tensor):
    weight = model.get_input_embeddings().weight
    original = weight.data.clone()
    weight.data *= 1 + 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    moved = _logits(model)
    weight.data.copy_(original)
    # Another expert moves logits by percents; a gated delta rule multiplies the change by some hundred, without any choice.
    assert (moved - logits).abs().max() < 1e-3 * logits.abs().max()


def test_the_same_seed_gives_the_same_weights(model_type: str, checkpoint: Path, tmp_path: Path):
    again = tiny_checkpoint(tmp_path / "model", model_type)
    assert (again / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
