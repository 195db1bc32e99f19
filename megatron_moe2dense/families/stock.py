"""What a stock transformers class says of itself on the meta device: where its decoder layers, experts, routers and shared experts stand.
Nothing of it is written down by hand; what has to be is in table.py."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.common.outputs import read_json
from megatron_moe2dense.families.ffn import FfnPlace, experts_at, ffn_at
from megatron_moe2dense.families.readers import of_json
from megatron_moe2dense.families.spec import Dims

Shape = tuple[int, ...]
_ROUTERS = ("gate", "router")
# What transformers raises for a config that it can not make a model of.
_UNREADABLE = (ValueError, KeyError, AttributeError, TypeError, AssertionError)


@dataclass(frozen=True)
class MoePlace:
    """The MoE of one decoder layer; paths and names are those inside the layer.

    Attributes:
        block: the module that routes, calls the experts and adds the shared ones; "" where the layer does that itself.
        router: its module. shared: FFNs of the block that every token goes through. shared_gate: whose sigmoid multiplies them.
    """

    layer: int
    block: str
    experts: FfnPlace
    router: str
    shared: tuple[FfnPlace, ...] = ()
    shared_gate: str | None = None

    @property
    def called(self) -> str:
        """The module that the block calls for the experts (dbrx: around the one with the matrices)."""
        return self.experts.path.rpartition(".")[0] if self.experts.flat else self.experts.path


class Stock:
    """A stock causal language model on the meta device, alone or inside a model for text and images or sound.

    Args:
        config: of the class. dtype: of its parameters, float32 by default.

    Attributes:
        model: the whole class. config: what the language model believes. base: that model without its head. base_prefix: of the names of
            base's parameters in the whole. layers: the decoder layers. prefix: of their parameters' names, without the number.
    """

    def __init__(self, config: Any, dtype: torch.dtype | None = None):
        with _quiet(), torch.device("meta"):
            self.model: Any = _build(config, torch.float32 if dtype is None else dtype).eval()
        self.config: Any = self.model.config.get_text_config()
        path, self.base = _language_model(self.model, self.config)
        self.base_prefix = f"{path}." if path else ""
        found = [(name, module) for name, module in self.base.named_modules(prefix=path) if _is_stack(module)]
        if not found:
            raise ValueError(f"{type(self.model).__name__} has no list of decoder layers")
        self.prefix, self.layers = max(found, key=lambda item: len(item[1]))

    @classmethod
    def read(cls, directory: Any, dtype: torch.dtype | None = None) -> Stock:
        """Of a checkpoint's config.json. UserError when transformers has no such class, or can not build it."""
        try:
            return cls(AutoConfig.from_pretrained(directory, trust_remote_code=False), dtype)
        except _UNREADABLE as error:
            _require_known(read_json(Path(directory) / "config.json", "a config"), f"{directory}/config.json")
            raise _unreadable(error, f"{directory}/config.json") from None

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str, dtype: torch.dtype | None = None) -> Stock:
        """As `read`, of the content of a config.json. where: its place, for the message."""
        _require_known(content, where)
        try:
            return cls(CONFIG_MAPPING[content["model_type"]].from_dict(of_json(content)), dtype)
        except _UNREADABLE as error:
            raise _unreadable(error, where) from None

    @staticmethod
    def usual_keys() -> dict[str, Any]:
        """Of the config of every class, with their defaults."""
        return PreTrainedConfig().to_dict()

    @property
    def name(self) -> str:
        """The model_type of the language model."""
        return self.config.model_type

    @property
    def wrapped(self) -> bool:
        """Whether the language model stands inside another model."""
        return self.config is not self.model.config

    def around(self, config: Any, wrapper: str | None = None) -> Any:
        """A config of the whole class with another one of the language model. wrapper: another type than the own for what is around."""
        if not self.wrapped:
            return config
        whole = copy.deepcopy(self.model.config)
        if wrapper is not None:
            known = CONFIG_MAPPING[wrapper]().to_dict()
            given = {name: value for name, value in whole.to_dict().items() if name in known}
            whole = CONFIG_MAPPING[wrapper](**_without_types(given))
        whole.text_config = config
        return whole

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor of the state dict."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def integers(self) -> dict[str, torch.dtype]:
        """Names and types of the tensors that are no floating-point numbers."""
        return {name: tensor.dtype for name, tensor in self.model.state_dict().items() if not tensor.is_floating_point()}

    @cached_property
    def layer_shapes(self) -> list[dict[str, Shape]]:
        """Of each decoder layer, by name in the layer."""
        return [{name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} for layer in self.layers]

    @cached_property
    def moe(self) -> dict[int, MoePlace]:
        """The layers with experts."""
        found = {number: _moe_of(number, layer) for number, layer in enumerate(self.layers)}
        return {number: place for number, place in found.items() if place is not None}

    @cached_property
    def dims(self) -> Dims:
        """Sizes: of the layers and FFNs as they are built (of the first with experts), of config.json where classes agree on the key."""
        config = self.config
        place, shapes = next(iter(self.moe.values()), None), self.layer_shapes
        dense = (layer for layer in range(len(self.layers)) if layer not in self.moe)
        heads = _first_of(config, "num_attention_heads", "n_heads", default=0)
        hidden = _first_of(config, "hidden_size", "d_model", default=0)
        head_dim = _head_dim(config, hidden, heads)
        rope = getattr(config, "rope_parameters", None) or {}
        return Dims(
            hidden_size=hidden,
            layers=len(self.layers),
            heads=heads,
            kv_heads=_first_of(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            value_dim=_first_of(config, "v_head_dim", default=head_dim),
            vocab_size=config.vocab_size,
            max_positions=_first_of(config, "max_position_embeddings", "max_seq_len", default=0),
            tied_embeddings=bool(self.model.all_tied_weights_keys),
            norm_eps=float(_first_of(config, "rms_norm_eps", "norm_eps", "layer_norm_epsilon", default=0.0)),
            rope_theta=float(rope.get("rope_theta", 0.0) or 0.0) if isinstance(rope, dict) else 0.0,
            dense_width=max((ffn.sizes(shapes[layer])[0] for layer in dense for ffn in self.ffns(layer).values()), default=0),
            experts=0 if place is None else place.experts.experts,
            active=0 if place is None else _first_of(config, "num_experts_per_tok", default=0),
            expert_width=0 if place is None else place.experts.sizes(shapes[place.layer])[0],
            shared_width=0 if place is None else sum(shared.sizes(shapes[place.layer])[0] for shared in place.shared),
        )

    @cached_property
    def parameters(self) -> int:
        """Of the whole class: tied ones once, buffers not."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def active_parameters(self, active: int) -> int:
        """Those that a token goes through when each layer runs so many of its routed experts."""
        shapes = ((place.experts, self.layer_shapes[layer]) for layer, place in self.moe.items())
        experts = sum(prod(shapes_of_layer[name]) for ffn, shapes_of_layer in shapes for name in ffn.names)
        return self.parameters - (experts * (self.dims.experts - active) // self.dims.experts if experts else 0)

    @cached_property
    def buffers(self) -> set[str]:
        """Names of the tensors of the state dict that are no parameters: a router's correction."""
        return self.shapes.keys() - {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    def in_model(self, layer: int, name: str) -> str:
        """The name in the model's state dict of a parameter of a layer."""
        return f"{self.prefix}.{layer}.{name}"

    @property
    def layers_in_base(self) -> str:
        """What the names of the layers' parameters begin with in the base model's state dict."""
        return self.prefix.removeprefix(self.base_prefix) + "."

    def ignored(self, names: Iterable[str]) -> set[str]:
        """Of tensors that the class does not hold, those that it knows of and leaves out when it loads a checkpoint; names in the model."""
        names = list(names)
        info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
        self.model._adjust_missing_and_unexpected_keys(info)  # patterns of the class, and buffers that checkpoints used to hold
        return set(names) - info.unexpected_keys

    def put(self, layers: nn.ModuleList) -> None:
        """Other modules in the place of the decoder layers; `layers` stays what it was."""
        outer, _, name = self.prefix.rpartition(".")
        setattr(self.model.get_submodule(outer), name, layers)

    def keeps(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type in which the class computes with a parameter when the model is loaded in `dtype`: some stay in float32."""
        strict = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        also = (getattr(self.model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
        kept = any(re.search(rf"((^|\.){re.escape(part)}(\.|$))", name) for part in (*strict, *also))
        return torch.promote_types(dtype, torch.float32) if kept else dtype

    def make_buffers(self, module: nn.Module, device: torch.device) -> None:
        """Buffers that no checkpoint holds (rotary frequencies, scales of embeddings), as the class makes them."""
        for inner in module.modules():
            gone = [name for name in inner._non_persistent_buffers_set if (found := inner._buffers.get(name)) is not None and found.is_meta]
            for name in gone:
                inner._buffers[name] = torch.empty_like(inner._buffers[name], device=device)  # type: ignore[arg-type]
            if gone:
                with torch.no_grad():
                    self.base._init_weights(inner)

    def ffns(self, layer: int) -> dict[str, FfnPlace]:
        """FFNs of linear layers and stacks of experts in a layer, by path; the inner ones of a block, not the shared stacks."""
        module, found = self.layers[layer], {}
        for path, _ in module.named_modules():
            if path and "attn" not in path and "attention" not in path:
                place = experts_at(module, path) or ffn_at(module, path)
                if place is not None:
                    found[path] = place
        return found


def _unreadable(error: Exception, where: str) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{where}: {reason}",
        "the config of a causal language model that stock transformers has",
        "check the config, or install a transformers that knows it",
    )


def _require_known(content: Mapping[str, Any], where: str) -> None:
    """UserError for a model_type that transformers does not know."""
    found, known = content.get("model_type"), set(CONFIG_MAPPING.keys())
    if found not in known:
        raise UserError(
            f"{where}: model_type {found!r}",
            f"a type that transformers {transformers.__version__} has",
            did_you_mean(str(found), known) or "docs/families.md lists the MoE types",
        )


def model_class(config: Any) -> Any:
    """What builds and loads the model of a config: AutoModelForCausalLM or, for a class that it does not list and for what is around a
    language model, the architecture that config.json names. ValueError where transformers has none."""
    wraps = config.get_text_config() is not config
    if not wraps and type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is not None and isinstance(config, cls.config_class):
        return cls
    auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise ValueError(f"transformers has no class for it {'around another' if wraps else 'alone'} ({type(config).__name__})")
    return auto


def _build(config: Any, dtype: torch.dtype) -> Any:
    cls = model_class(config)
    return getattr(cls, "from_config" if hasattr(cls, "_model_mapping") else "_from_config")(config, dtype=dtype)


def _language_model(model: Any, config: Any) -> tuple[str, Any]:
    """Path and module of the language model without its head: the innermost model of this config that has the decoder layers."""
    inside = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel) and module.config is config]
    return [(path, module) for path, module in inside if any(_is_stack(part) for part in module.modules())][-1]


def _without_types(config: dict[str, Any]) -> dict[str, Any]:
    """Of a config and those in it, what does not say of which class they are."""
    named = ("model_type", "architectures")
    return {name: _without_types(value) if isinstance(value, dict) else value for name, value in config.items() if name not in named}


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of decoder layers: several children that hold parameters of more than one module."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and sum(1 for _ in module[0].modules()) > 4


def _moe_of(number: int, layer: nn.Module) -> MoePlace | None:
    for path, _ in layer.named_modules():
        experts = experts_at(layer, path) if path else None
        if experts is None:
            continue
        block = path.rpartition(".")[0]
        if experts.flat:  # dbrx: a module of its own around the matrices
            block = block.rpartition(".")[0]
        router = next((name for name in (_joined(block, each) for each in _ROUTERS) if _has(layer, name)), None)
        if router is None:
            raise ValueError(f"layer {number}: {path} without a router beside it")
        shared, shared_gate = _shared(layer, block, path)
        return MoePlace(number, block, experts, router, shared, shared_gate)
    return None


def _shared(layer: nn.Module, block: str, experts: str) -> tuple[tuple[FfnPlace, ...], str | None]:
    if not block:
        return (), None
    children = [_joined(block, name) for name, _ in layer.get_submodule(block).named_children()]
    places = [ffn_at(layer, path) for path in children if path != experts]
    gates = [f"{path}.weight" for path in children if re.search(r"shared_experts?_gate$", path)]
    return tuple(place for place in places if place is not None), gates[0] if gates else None


def _first_of(config: Any, *names: str, default: Any) -> Any:
    """The first of these keys that the config has a value for."""
    return next((value for name in names if (value := _value(config, name)) is not None), default)


def _value(config: Any, name: str) -> Any:
    """None for a key that is absent, or that layers have values of their own for."""
    try:
        return getattr(config, name, None)
    except (AttributeError, ValueError, KeyError, RuntimeError):
        return None


def _head_dim(config: Any, hidden: int, heads: int) -> int:
    """Of queries and keys; with and without rotary positions together."""
    parts = [_value(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(isinstance(part, int) for part in parts):
        return sum(parts)  # type: ignore[arg-type]
    return _first_of(config, "head_dim", default=hidden // heads if heads else 0)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers warns of config keys while a model is built."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
