"""Where a feed-forward network, or a stack of experts, stands in a stock module: found by the roles its parameters' names tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from megatron_moe2dense.families.spec import Part

# Parameter names of the stock classes, by role. Gate and up may be one tensor.
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3", "v1"), ("down_proj", "w2", "output_linear")
_GATE_UP = ("gate_up_proj", "input_linear")
# Projected gate rows (None where there is no gate) and up rows, [..., I] each, to what goes into the down projection, [..., I].
Gating = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
_PARTS: tuple[Part, ...] = ("up", "down", "up_bias", "down_bias")


@dataclass(frozen=True)
class Ffn:
    """A feed-forward network, an expert as well as the dense result: h = gating(gate x, up x), y = down h, in the dtype of the source.

    gate_FD: None where there is no gate. Biases: None where there are none. F neurons, D channels.
    """

    gate_FD: torch.Tensor | None
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    gate_bias_F: torch.Tensor | None = None
    up_bias_F: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None


@dataclass(frozen=True)
class FfnPlace:
    """Parameters of one FFN, or of `experts` stacked ones, by name inside a decoder layer.

    Attributes:
        path: of the module in the layer. gate: None without a gate, or where `up` holds the rows of both (`packed`).
        transposed: matrices are [inputs, outputs]. interleaved: in a packed tensor gate and up rows alternate.
        flat: experts follow each other along axis 0 of two-dimensional tensors, down as [E * I, D].
    """

    path: str
    up: str
    down: str
    gate: str | None = None
    packed: bool = False
    experts: int = 0
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False
    up_bias: str | None = None
    gate_bias: str | None = None
    down_bias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter, by name in the layer."""
        return tuple(name for part in _PARTS for name in self.names_of(part))

    def names_of(self, part: Part) -> tuple[str, ...]:
        """The parameters that hold a part, by name in the layer: none, one, or a gate and an up one."""
        names = {
            "up": (self.gate, self.up),
            "down": (self.down,),
            "up_bias": (self.gate_bias, self.up_bias),
            "down_bias": (self.down_bias,),
        }
        return tuple(name for name in names[part] if name is not None)

    @property
    def gated(self) -> bool:
        """Whether neurons have a gate."""
        return self.packed or self.gate is not None

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Neurons of one FFN, and channels it writes. shapes: of the layer's parameters."""
        shape = shapes[self.down]
        if self.flat:
            return shape[0] // self.experts, shape[1]
        outputs, inputs = shape[-2:] if not self.transposed else (shape[-1], shape[-2])
        return inputs, outputs

    def read_part(self, part: Part, tensor: Callable[[str], torch.Tensor]) -> list[torch.Tensor]:
        """The gate (where there is one) and up matrix [F, D], or the down matrix [D, F], or their biases.

        tensor: a parameter of one FFN, or of one expert (without the axis that counts them), by name in the layer.
        """
        found = [self._turned(part, tensor(name)) for name in self.names_of(part)]
        return list(halves(found[0], self.interleaved)) if found and self._holds_both(part) else found

    def write_part(self, part: Part, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The inverse of `read_part`: parameters by name in the layer; of an expert without the axis that counts them."""
        both = [joined(tensors[0], tensors[1], self.interleaved)] if self._holds_both(part) else tensors
        return ((name, self._turned(part, tensor)) for name, tensor in zip(self.names_of(part), both, strict=True))

    def _holds_both(self, part: Part) -> bool:
        """Whether one parameter holds the rows of gate and up."""
        return self.packed and part in ("up", "up_bias")

    def _turned(self, part: Part, tensor: torch.Tensor) -> torch.Tensor:
        """From the way a matrix is stored to [outputs, inputs], or back."""
        return tensor.T if (self.transposed and tensor.ndim == 2) or (self.flat and part == "down") else tensor

    def read(self, tensor: Callable[[str], torch.Tensor]) -> Ffn:
        """All of it. tensor: as `read_part` takes it."""
        up, down, up_bias, down_bias = (self.read_part(part, tensor) for part in _PARTS)
        gate, gate_bias = (found[0] if len(found) == 2 else None for found in (up, up_bias))
        return Ffn(gate, up[-1], down[0], gate_bias, up_bias[-1] if up_bias else None, down_bias[0] if down_bias else None)

    def write(self, ffn: Ffn) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters that hold `ffn`, by name in the layer; biases that it lacks are zeros."""
        width, hidden = len(ffn.up_FD), len(ffn.down_DF)
        gate = [] if ffn.gate_FD is None else [ffn.gate_FD]
        if bool(gate) != self.gated:
            raise ValueError(f"an FFN {'with' if gate else 'without'} a gate in a place {'with' if self.gated else 'without'} one")
        biases = [ffn.up_FD.new_zeros(width) if bias is None else bias for bias in (ffn.gate_bias_F, ffn.up_bias_F)]
        yield from self.write_part("up", [*gate, ffn.up_FD])
        yield from self.write_part("down", [ffn.down_DF])
        if self.up_bias is not None:
            yield from self.write_part("up_bias", biases if self.packed or self.gate_bias is not None else biases[1:])
        if self.down_bias is not None:
            yield from self.write_part("down_bias", [ffn.up_FD.new_zeros(hidden) if ffn.down_bias_D is None else ffn.down_bias_D])


def halves(rows: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up out of one tensor with the rows of both."""
    gate, up = (rows[0::2], rows[1::2]) if interleaved else rows.chunk(2)
    return gate, up


def joined(gate: torch.Tensor, up: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """One tensor with the rows of both."""
    return torch.stack((gate, up), dim=1).flatten(0, 1) if interleaved else torch.cat((gate, up))


def ffn_at(layer: nn.Module, path: str) -> FfnPlace | None:
    """The FFN of linear layers that module `path` of a decoder layer is; None when it is none."""
    module = layer.get_submodule(path)
    linear = {name: child for name, child in module.named_children() if getattr(getattr(child, "weight", None), "ndim", 0) == 2}

    def named(roles: tuple[str, ...]) -> str | None:
        return next((name for name in roles if name in linear), None)

    gate, up, down, both = named(_GATE), named(_UP), named(_DOWN), named(_GATE_UP)
    if down is None or (up is None and both is None):
        return None

    def parameter(name: str | None, kind: str) -> str | None:
        has = name is not None and getattr(linear[name], kind, None) is not None
        return f"{path}.{name}.{kind}" if has else None

    rows = both if both is not None else up
    return FfnPlace(
        path,
        up=str(parameter(rows, "weight")),
        down=str(parameter(down, "weight")),
        gate=None if both is not None else parameter(gate, "weight"),
        packed=both is not None,
        up_bias=parameter(rows, "bias"),
        gate_bias=None if both is not None else parameter(gate, "bias"),
        down_bias=parameter(down, "bias"),
    )


def experts_at(layer: nn.Module, path: str) -> FfnPlace | None:
    """The stack of experts that module `path` of a decoder layer is; None when it is none."""
    module: Any = layer.get_submodule(path)
    own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if {"w1", "v1", "w2"} <= set(own):
        count = int(module.moe_num_experts)
        return FfnPlace(path, up=f"{path}.v1", down=f"{path}.w2", gate=f"{path}.w1", experts=count, flat=True)
    up = next((name for name in ("gate_up_proj", "up_proj") if len(own.get(name, ())) == 3), None)
    if up is None or len(own.get("down_proj", ())) != 3 or "gate_proj" in own:
        return None
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:  # a class outside the experts interface
        transposed = own["down_proj"][2] == own[up][1] and own["down_proj"][1] * (2 if up == "gate_up_proj" else 1) == own[up][2]
    place = FfnPlace(
        path,
        up=f"{path}.{up}",
        down=f"{path}.down_proj",
        packed=up == "gate_up_proj",
        experts=own["down_proj"][0],
        transposed=bool(transposed),
        interleaved=not getattr(module, "is_concatenated", True),
    )
    if f"{up}_bias" in own:
        place = replace(place, up_bias=f"{path}.{up}_bias", down_bias=f"{path}.down_proj_bias")
    return place


def gating_of(experts: Any, place: FfnPlace) -> Gating:
    """What a stock experts module makes of its projected rows."""
    if not place.gated:
        return lambda _gate, up: experts.act_fn(up)
    own = getattr(experts, "_apply_gate", None)
    if own is None or getattr(own, "__func__", own) is _default_apply_gate:
        activation = experts.activation_fn if hasattr(experts, "activation_fn") else experts.act_fn
        return lambda gate, up: activation(gate) * up
    if place.interleaved:
        return lambda gate, up: own(torch.stack((gate, up), dim=-1).flatten(-2))  # type: ignore[arg-type]
    return lambda gate, up: own(torch.cat((gate, up), dim=-1))  # type: ignore[arg-type]
