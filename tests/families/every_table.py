"""What the stock classes of mixture-of-experts types say about their experts, as lines of text: read from tiny models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from tests.families.every import experts_modules, tiny_checkpoint, tiny_model

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "mlp_only_layers", "first_k_dense_replace", "num_dense_layers")
LAYER = re.compile(r"^.*?\.(?:layers|blocks)\.(\d+)\.")


def table(model_types: list[str]) -> Iterator[str]:
    """A block of lines for each type; shapes are those of the tiny model."""
    for model_type in model_types:
        model = tiny_model(model_type)
        names, config = list(experts_modules(model)), model.config.to_dict()
        prefix, number = _layer(names[-1])
        kinds = ", ".join(f"{key}={config[key]}" for key in KINDS if config.get(key)) or "all alike"
        in_memory = {name: [*value.shape] for name, value in model.state_dict().items() if name.startswith(prefix)}
        on_disk = {name: shape for name, shape in _stored(model_type).items() if _layer(name)[1] == number}
        yield f"## {model_type}: {type(model).__name__}"
        yield f"   layers {kinds}; experts in {sorted({_layer(name)[1] for name in names})}"
        for name in (name for name in names if name.startswith(prefix)):
            yield f"   experts {prefix}|{name.removeprefix(prefix)}: {_experts(model.get_submodule(name))}"
        yield f"   router logits: {'; '.join(_recorders(model)) or 'not recorded'}"
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


def _recorders(model: PreTrainedModel) -> list[str]:
    """The class and the index of its output that transformers records as router logits, and the first module of that class."""
    recorders: list[str] = []
    for part in model.modules():
        recorded = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", [])
        for each in recorded if isinstance(recorded, list) else [recorded]:
            recorder = each if isinstance(each, OutputRecorder) else OutputRecorder(each)
            kind = recorder.target_class
            place = next((name for name, module in model.named_modules() if type(module) is kind), "no module")
            text = f"{kind.__name__} output {recorder.index} {recorder.layer_name or ''} at {place}"
            if text not in recorders:
                recorders.append(text)
    return recorders


def _shapes(tensors: dict[str, list[int]], prefix: str = "") -> str:
    """Names and shapes; what is numbered by expert appears once, with its count."""
    numbered: dict[str, list[list[int]]] = {}
    for name, shape in tensors.items():
        numbered.setdefault(re.sub(r"(experts\.)\d+\.", r"\1{e}.", name.removeprefix(prefix)), []).append(shape)
    return "; ".join(f"{name}{shapes[0]}" + (f" x{len(shapes)}" if len(shapes) > 1 else "") for name, shapes in numbered.items())
