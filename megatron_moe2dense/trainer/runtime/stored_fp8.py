"""Matrices of a frozen model that stay FP8 in memory: E4M3 codes and float32 scales, which become numbers of the compute type each time a
module reads its weight, and are kept as no more than that.

Megatron-Core's layers and Transformer Engine's read weights as attributes, so torch's own parametrizations serve both. The product itself
is one of the compute type: nothing here multiplies in FP8.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.nn.utils import parametrize

from megatron_moe2dense.checkpoint.schemes.encoded import widened

# Columns that share a scale where the files have no scales to keep.
BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ROUTERS = (".router.weight", ".gate_weight")


def is_stored(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of this Megatron name and shape is kept in FP8: the matrices of decoder layers, but for what chooses experts."""
    return ".layers." in f".{name}" and len(shape) == 2 and min(shape) > 1 and not name.endswith(_ROUTERS)


def columns_of_scale(columns: int, whole: int, block: int) -> int:
    """How many columns of a rank's part share a scale, so that no group reaches over the edge of a block.

    Args:
        columns: of the part. whole: of the matrix. block: columns of a block in the files.
    """
    return math.gcd(columns, min(block, whole))


def nbytes(shape: Sequence[int], group: int) -> int:
    """Of codes [rows, columns] and their scales, one for so many columns of a row."""
    return math.prod(shape) + 4 * math.prod(shape) // group


def rounded(weight_RC: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [R, C / group] nearest to a weight.

    A scale is the least power of two (ours) that brings its block's largest value into the range of E4M3: the numbers are then exact in
    bfloat16, and those of MXFP4 stay what they are.
    """
    blocks = weight_RC.float().unflatten(-1, (-1, group))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1) / _LARGEST)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)  # of a power of two
    scales = torch.ldexp(torch.ones_like(mantissa), exponent)
    return (blocks / scales[..., None]).flatten(-2).to(torch.float8_e4m3fn), scales


def grouped(factors_RC: Tensor, groups: Sequence[int]) -> Tensor:
    """Scales [R, C / g] of one a number, with the first of these g whose groups share one."""
    for group in groups:
        blocks = factors_RC.unflatten(-1, (-1, group))
        if bool((blocks == blocks[..., :1]).all()):
            return blocks[..., 0].contiguous()
    raise AssertionError(f"scales differ inside groups of {groups} columns")


def decoded(codes_RC: Tensor, scales: Tensor) -> Tensor:
    """The numbers, float32."""
    numbers = widened(codes_RC) if codes_RC.device.type == "cpu" else codes_RC.float()
    return numbers.unflatten(-1, (scales.shape[-1], -1)).mul_(scales[..., None]).flatten(-2)


class Fp8Weight(torch.nn.Module):
    """A parametrization: codes [R, C] and scales [R, C / g] to the weight [R, C].

    Attributes:
        bits: of a weight that was rounded, `bit_sum` of what the files hold; None where codes and scales are theirs.
    """

    def __init__(self, stored: tuple[Tensor, Tensor], types: tuple[torch.dtype, torch.dtype], bits: int | None = None):
        """types: what the files' numbers are read as, and the compute type."""
        super().__init__()
        self._stored, self._types, self.bits = [stored], types, bits

    def forward(self, codes_RC: Tensor, scales: Tensor) -> Tensor:
        """The weight, as reading the files gives it."""
        read_as, compute = self._types
        return decoded(codes_RC, scales).to(read_as).to(compute)

    def place(self, device: torch.device) -> None:
        """Where codes and scales are to stand."""
        codes, scales = self._stored.pop()
        self._stored.append((codes.to(device), scales.to(device)))

    def right_inverse(self, _weight: Tensor) -> tuple[Tensor, Tensor]:
        """What torch registers in the weight's place, once."""
        return self._stored.pop()


def allocate(model: torch.nn.Module, name: str) -> torch.nn.Parameter:
    """Memory, in the model's type, for a parameter that has none; it is still to be filled."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = torch.nn.Parameter(torch.empty_like(getattr(module, attribute), device=_device(model)), requires_grad=False)
    setattr(module, attribute, parameter)
    return parameter


def _device(model: torch.nn.Module) -> torch.device:
    return next(each.device for each in model.parameters() if not each.is_meta)


def store(model: torch.nn.Module, name: str, weight: Fp8Weight) -> None:
    """Put it into the place of a parameter of the model that has no memory yet."""
    path, _, attribute = name.rpartition(".")
    weight.place(_device(model))
    parametrize.register_parametrization(model.get_submodule(path), attribute, weight, unsafe=True)


def stored(model: torch.nn.Module) -> Iterator[tuple[str, Tensor, int | None]]:
    """Name, value (made now) and `Fp8Weight.bits` of each weight that is kept in FP8."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, (weight,) in module.parametrizations.items():  # type: ignore[union-attr]
                yield f"{path}.{attribute}", getattr(module, attribute), weight.bits


def is_plain(name: str) -> bool:
    """Whether a name of `named_parameters` is none of `stored`."""
    return ".parametrizations." not in name


def leave_unallocated(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Layers whose matrices have no memory when they are built; `settle` and `store` give it."""
    specs: Any = block.layer_specs or ()
    return replace(block, layer_specs=[replace(spec, module=type(spec.module.__name__, (_Unallocated, spec.module), {})) for spec in specs])


class _Unallocated:
    """Before the class of a layer."""

    def __init__(self, *arguments: Any, **options: Any):
        with _on_meta():
            super().__init__(*arguments, **options)


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """A matrix that a module registers goes to torch's meta device at once, so that no two have memory (accelerate's way); buffers and
    what else is computed at building stay real, which under `torch.device("meta")` they would not."""
    register = torch.nn.Module.register_parameter

    def register_without_memory(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.dim() > 1:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def settle(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Type, device and memory for all that is not kept in FP8."""
    model.to(dtype)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and not is_stored(name, parameter.shape):
            allocate(model, name)
