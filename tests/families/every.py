"""Tiny random stock models of every mixture-of-experts text type that the installed transformers has, found by walking it.

python -m tests.families.every [model_type ...]     # prints what the stock classes say about their experts
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_AND_TEXT

from tests.families.tiny_configs import EXPERTS, text_config
from tests.families.tiny_towers import wrapper_config

EXPERTS_CLASS = re.compile(r"^class \w+(Experts|MoE)\(nn\.Module\)", re.MULTILINE)


@cache
def moe_types() -> tuple[str, ...]:
    """Types with a stock causal language model whose file defines experts; read without importing it, as most of 180 define none.

    Left out: types without such a class (encoder-decoders among them), and wrappers.
    """
    names = {model_type: _causal_name(model_type) for model_type in CONFIG_MAPPING_NAMES}
    return tuple(model_type for model_type, name in names.items() if name and defines_experts(name) and not is_wrapper(model_type))


@cache
def wrapper_types() -> tuple[str, ...]:
    """Types of models for text and images (and sound) whose text model has experts.

    Left out: block diffusion models, which are not causal.
    """
    names = {
        model_type: name for model_type, name in IMAGE_AND_TEXT.items() if isinstance(name, str) and model_type in CONFIG_MAPPING_NAMES
    }
    return tuple(
        model_type
        for model_type, name in names.items()
        if not name.endswith("ForBlockDiffusion")
        and is_wrapper(model_type)
        and (defines_experts(name) or CONFIG_MAPPING[model_type].sub_configs_defaults["text_config"].model_type in moe_types())
    )


def is_wrapper(model_type: str) -> bool:
    """Whether a text config stands inside the type's config."""
    return "text_config" in CONFIG_MAPPING[model_type].sub_configs


def stock_class(model_type: str) -> type[PreTrainedModel]:
    return getattr(transformers, IMAGE_AND_TEXT[model_type] if is_wrapper(model_type) else _causal_name(model_type))


def tiny_config(model_type: str, **changed: Any) -> PreTrainedConfig:
    """A config of the type with small sizes, in float32; `changed` are other values of keys of (its) text config."""
    return (wrapper_config if is_wrapper(model_type) else text_config)(model_type, **changed)


def _causal_name(model_type: str) -> str:
    """The class that is a plain causal language model, "" where transformers has none.

    Mistral4ForCausalLM is listed among the classes for images and text alone, so both lists are read.
    """
    names = (table.get(model_type, "") for table in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, IMAGE_AND_TEXT))
    return next((name for name in names if isinstance(name, str) and name.endswith("ForCausalLM")), "")


def defines_experts(class_name: str) -> bool:
    return EXPERTS_CLASS.search(source_of(class_name)) is not None


def source_of(class_name: str) -> str:
    """The text of the file of transformers that defines the class."""
    module = transformers._class_to_module[class_name]  # transformers 5: the table of its lazy imports
    specification = find_spec(f"transformers.{module}")
    assert specification is not None
    assert specification.origin is not None
    return Path(specification.origin).read_text(encoding="utf-8")


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """By name, what holds the weights of all routed experts of a layer: the innermost modules of a class ...Experts or ...MoE.

    Experts of images alone are left out.
    """
    named = {name: module for name, module in model.named_modules() if _holds_experts(name, module)}
    return {name: module for name, module in named.items() if not any(other.startswith(f"{name}.") for other in named)}


def _holds_experts(name: str, module: nn.Module) -> bool:
    # By name too: Inkling's shared experts are a module of that kind, GraniteMoeSharedExperts are the routed ones of that type.
    return type(module).__name__.endswith(("Experts", "MoE")) and not name.endswith("shared_experts") and "vision" not in name


def tiny_model(model_type: str, seed: int = 0, **changed: Any) -> PreTrainedModel:
    """A stock model in float32, for inference. Matrices are random, vectors the class's own values (norms: ones) with noise.

    changed: as in `tiny_config`.
    """
    return random_model(model_type, tiny_config(model_type, **changed), seed)


def random_model(model_type: str, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """`tiny_model` of a config of one's own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = stock_class(model_type)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        model.get_input_embeddings().weight.mul_(4)  # tokens differ more than they share, and so do the experts they choose
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # experts by token, zero until a checkpoint is loaded
                buffer.copy_(torch.rand(len(buffer), EXPERTS, generator=generator).argsort(-1)[:, : buffer.shape[1]])
            elif name in saved and buffer.is_floating_point() and buffer.dim() < 2:  # the others are tables that the class computes
                buffer.add_(0.03 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("balancing_biases"):
                buffer[-1] = -1.0  # transformers 5.23 sets it to that again when it loads a checkpoint, whatever stands there
    return model


def tiny_checkpoint(folder: Path, model_type: str, seed: int = 0, **changed: Any) -> Path:
    """`tiny_model`, saved in `folder` under the names that transformers writes."""
    tiny_model(model_type, seed, **changed).save_pretrained(folder)
    return folder


def as_in_memory(source: Path, folder: Path) -> Path:
    """The checkpoint `source` with the names and shapes that its stock class has in memory, experts stacked: another layout of the same."""
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    model = stock_class(model_type).from_pretrained(source)
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    tensors = {
        tensor.data_ptr(): (name, tensor) for name, tensor in reversed(model.state_dict().items())
    }  # tied ones once, by their first name
    save_file({name: tensor.contiguous() for name, tensor in tensors.values()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    from tests.families.every_table import table

    for line in table(sys.argv[1:] or [*moe_types(), *wrapper_types()]):
        print(line)
