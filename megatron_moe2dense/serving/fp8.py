"""FP8 weights for serving, by compressed-tensors: a scale a row; activations are scaled token by token as they come (FP8_DYNAMIC)."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe2dense.checkpoint.shards import TensorSpec
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.disk import Disk
from megatron_moe2dense.families.stock import Stock

_FORMAT, _PRESET, _CODES = "float-quantized", "FP8_DYNAMIC", "F8_E4M3"


class Fp8Weights:
    """Which tensors are written in FP8, how, and what config.json says of it.

    The linear layers of the decoder layers, but for routers: embeddings, head, norms, stacks of experts and what is around a language
    model stay as they are.

    Args:
        stock: the class. disk: the tensors' names in the files.

    Raises:
        UserError: compressed-tensors is not installed.
    """

    def __init__(self, stock: Stock, disk: Disk):
        require_library()
        from compressed_tensors.quantization import preset_name_to_scheme

        self._scheme = preset_name_to_scheme(_PRESET, ["Linear"])
        linear = [name for name, module in stock.model.named_modules() if isinstance(module, torch.nn.Linear)]
        chosen = [name for name in linear if _is_chosen(stock, name) and disk.is_plain(f"{name}.weight")]
        files = {name: disk.names_of(f"{name}.weight") for name in linear}
        self.names = {files[name][0] for name in chosen if files[name]}
        left = [name for name in linear if name not in chosen]
        as_stored = [stored.removesuffix(".weight") for name in left for stored in files[name] if stored.endswith(".weight")]
        # A stack of experts is no linear layer for transformers; vLLM takes it for one unless it is named.
        stacks = [stock.in_model(layer, place.experts.path) for layer, place in stock.moe.items()]
        self._ignored = list(dict.fromkeys([*left, *as_stored, *stacks]))

    def config(self) -> dict[str, Any]:
        """quantization_config."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        return QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format=_FORMAT,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=self._ignored,
        ).model_dump(mode="json", exclude_none=True)

    def specs(self, spec: TensorSpec) -> list[TensorSpec]:
        """What is written for a tensor: itself, or codes and a scale a row in its type."""
        if spec.name not in self.names:
            return [spec]
        return [TensorSpec(spec.name, _CODES, spec.shape), TensorSpec(f"{spec.name}_scale", spec.dtype, (spec.shape[0], 1))]

    def encoded(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `specs`, by name."""
        if name not in self.names:
            return {name: tensor}
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization.utils import calculate_qparams

        args = self._scheme.weights
        assert args is not None, "the preset has weights"
        scale, _ = calculate_qparams(tensor.amin(1, keepdim=True), tensor.amax(1, keepdim=True), args)
        parts: dict[str, torch.Tensor | None] = {"weight": tensor, "weight_scale": scale.to(tensor.dtype)}
        found = BaseCompressor.get_value_from_registry(_FORMAT).compress(parts, self._scheme)
        written = {name: found["weight"], f"{name}_scale": found["weight_scale"]}
        return {part: values for part, values in written.items() if values is not None}


def require_library() -> None:
    """UserError naming the extra when compressed-tensors is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"no compressed-tensors ({error})", "compressed-tensors, for format=fp8", "pip install 'megatron_moe2dense[export]'"
        ) from None


def _is_chosen(stock: Stock, module: str) -> bool:
    number, _, inside = module.removeprefix(f"{stock.prefix}.").partition(".")
    if not module.startswith(f"{stock.prefix}.") or not inside:
        return False
    place = stock.moe.get(int(number))
    return place is None or (
        inside != place.router and not inside.startswith(f"{place.router}.") and f"{inside}.weight" != place.shared_gate
    )
