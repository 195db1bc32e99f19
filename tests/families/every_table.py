"""What the stock classes of mixture-of-experts types say about their experts, as lines of text: read from tiny models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from tests.families.every import experts_modules, tiny_checkpoint, tiny_model

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "mlp_only_layers", "first_k_dense_replace", "num_dense_layers")
TOKENS = torch.arange(3, 27).view(2, 12)
LAYER = re.compile(r"^(?:.*?\.)?(?:layers|blocks)\.(\d+)\.")


def table(model_types: list[str]) -> Iterator[str]:
    """A block of lines for each type; shapes are those of the tiny model."""
    for model_type in model_types:
        model = tiny_model(model_type)
        names, config = list(experts_modules(model)), model.config.get_text_config().to_dict()
        prefix, number = _layer(names[-1])
        kinds = ", ".join(f"{key}={config[key]}" for key in KINDS if config.get(key)) or "all alike"
        in_memory = {name: [*value.shape] for name, value in model.state_dict().items() if name.startswith(prefix)}
        on_disk = {name: shape for name, shape in _stored(model_type).items() if _layer(name)[1] == number}
        yield f"## {model_type}: {type(model).__name__}"
        yield f"   layers {kinds}; experts in {sorted({_layer(name)[1] for name in names})}"
        for name in (name for name in names if name.startswith(prefix)):
            yield f"   experts {prefix}|{name.removeprefix(prefix)}: {_experts(model.get_submodule(name))}"
        yield from (f"   router logits: {line}" for line in _routers(model))
        yield f"   class: {_shapes(in_memory, prefix)}"
        yield f"   disk:  {_shapes(on_disk)}"
        yield ""


def _layer(name: str) -> tuple[str, int]:
    """("model.layers.3.", 3); ("", -1) of what stands in no layer."""
    found = LAYER.match(name)
    return (found[0], int(found[1])) if found else ("", -1)


def _stored(model_type: str) -> dict[str, list[int]]:
    with TemporaryDirectory() as folder:
        path = tiny_checkpoint(Path(folder) / "model", model_type) / "model.safetensors"
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _experts(module: nn.Module) -> str:
    kind = type(module)
    flags = [f"{name}={getattr(module, name)}" for name in FLAGS if hasattr(module, name)] or ["(not in the experts interface)"]
    gate = getattr(kind, "_apply_gate", None)
    if gate is not None and gate.__module__ == kind.__module__:
        flags.append("_apply_gate of its own")
    if hasattr(module, "act_fn"):
        flags.append(f"act_fn={type(module.act_fn).__name__}")
    return f"{kind.__name__}{inspect.signature(kind.forward)} {' '.join(flags)}"


def _routers(model: PreTrainedModel) -> Iterator[str]:
    """Each class whose output transformers records as router logits: which output, where, what goes in and comes out."""
    recorders = {id(each): each for part in model.modules() for each in _recorded(part)}
    for recorder in {each.target_class: each for each in recorders.values()}.values():
        routers = {name: module for name, module in model.named_modules() if type(module) is recorder.target_class}
        if not routers:
            continue
        calls: list[tuple[Any, ...]] = []
        hook = list(routers.values())[-1].register_forward_hook(lambda *call, calls=calls: calls.append(call[1:]), with_kwargs=True)
        with torch.no_grad():
            model(input_ids=TOKENS, use_cache=False)
        hook.remove()
        arguments, named, outputs = calls[0]
        recorded = outputs[recorder.index] if isinstance(outputs, tuple) else outputs
        kind = "probabilities, not logits" if torch.allclose(recorded.sum(-1), torch.ones(())) else "logits"
        yield (
            f"{recorder.target_class.__name__} output {recorder.index} ({kind}) at {next(iter(routers))}, {len(routers)} such modules:"
            f" {_signature([*arguments, *named.values()])} -> {_signature(outputs)}"
        )


def _recorded(part: nn.Module) -> list[OutputRecorder]:
    recorded = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", [])
    return [
        each if isinstance(each, OutputRecorder) else OutputRecorder(each)
        for each in (recorded if isinstance(recorded, list) else [recorded])
    ]


def _signature(values: Any) -> str:
    """Shapes: 24 tokens are 2 sequences of 12, 8 experts, 2 of them active, hidden size 64."""
    values = values if isinstance(values, (tuple, list)) else [values]
    return ", ".join(f"{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__ for value in values)


def _shapes(tensors: dict[str, list[int]], prefix: str = "") -> str:
    """Names and shapes; what is numbered by expert appears once, with its count."""
    numbered: dict[str, list[list[int]]] = {}
    for name, shape in tensors.items():
        numbered.setdefault(re.sub(r"(experts\.)\d+\.", r"\1{e}.", name.removeprefix(prefix)), []).append(shape)
    return "; ".join(f"{name}{shapes[0]}" + (f" x{len(shapes)}" if len(shapes) > 1 else "") for name, shapes in numbered.items())
