"""Checkpoints of tiny models quantised by the libraries that people use: transformers' FP8, compressed-tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

Tensors = dict[str, torch.Tensor]
# (name, weight) -> what stands in the files for it
Encode = Callable[[str, torch.Tensor], Tensors]


class _Quantizer:
    """What transformers' operations ask of the quantizer that they belong to."""

    def __init__(self, block: tuple[int, int]):
        self.quantization_config = FineGrainedFP8Config(weight_block_size=block)


def fp8_blocks(name: str, weight: torch.Tensor, block: tuple[int, int] = (16, 16)) -> Tensors:
    """By transformers: E4M3 and a float32 scale a block."""
    found = cast(Any, Fp8Quantize(_Quantizer(block))).convert({name: [weight.float()]})
    return {key: cast(torch.Tensor, value[0] if isinstance(value, list) else value).contiguous() for key, value in found.items()}


def of_fp8_blocks(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By transformers."""
    return Fp8Dequantize(_Quantizer((1, 1)))._dequantize_one(codes, scales, dtype)


def quantised(source: Path, directory: Path, encode: Encode, config: Mapping[str, Any], skip: tuple[str, ...] = ("lm_head",)) -> Path:
    """A copy of a checkpoint whose linear layers, but for the router and what `skip` says, are encoded. config: quantization_config."""
    shutil.copytree(source, directory)
    tensors: Tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    left = (*skip, "embed_tokens", "norm", ".mlp.gate.", "router")
    out: Tensors = {}
    for name, tensor in tensors.items():
        plain = tensor.ndim < 2 or any(part in name for part in left)
        out |= {name: tensor} if plain else encode(name, tensor)
    save_file(out, directory / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "quantization_config": dict(config)}))
    return directory


def as_fp8(source: Path, directory: Path, block: tuple[int, int] = (16, 16)) -> Path:
    """As DeepSeek-V3 and Qwen3-FP8 are published: blocks with `weight_scale_inv`, router, embeddings and head as they are."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    excluded = {"modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    return quantised(source, directory, lambda name, weight: fp8_blocks(name, weight, block), config | excluded)


def dequantised(
    source: Path, directory: Path, weight_of: Callable[[str, Tensors], torch.Tensor | None], of_scheme: tuple[str, ...]
) -> Path:
    """A copy in plain bfloat16. weight_of: the library's own numbers of a weight, by its first tensor. of_scheme: ends of other tensors."""
    shutil.copytree(source, directory)
    stored, out = load_file(source / "model.safetensors"), {}
    for name, tensor in stored.items():
        if name.endswith(of_scheme):
            continue
        weight = weight_of(name, stored)
        out[name.replace("weight_packed", "weight")] = tensor if weight is None else weight.to(torch.bfloat16).contiguous()
    save_file(out, directory / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    del content["quantization_config"]
    (directory / "config.json").write_text(json.dumps({**content, "dtype": "bfloat16"}))
    return directory


def from_fp8(source: Path, directory: Path) -> Path:
    """What transformers makes of `as_fp8`."""

    def weight_of(name: str, stored: Tensors) -> torch.Tensor | None:
        scales = stored.get(f"{name}_scale_inv")
        return None if scales is None else of_fp8_blocks(stored[name], scales)

    return dequantised(source, directory, weight_of, ("_scale_inv",))
