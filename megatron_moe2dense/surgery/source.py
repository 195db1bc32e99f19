"""A MoE checkpoint as the surgery sees it: family data beside the opened index, every tensor's presence and shape checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import Dims, FamilySpec, MoeTensors, Router, moe_family_of


@dataclass(frozen=True)
class MoeSource:
    """An opened MoE checkpoint. tensors: where its MoE blocks stand. layers: numbers of the layers with experts."""

    index: CheckpointIndex
    spec: FamilySpec
    dims: Dims
    router: Router
    tensors: MoeTensors
    layers: tuple[int, ...]

    @classmethod
    def open(cls, directory: str | Path) -> MoeSource:
        """Read headers and check the tensors of the MoE blocks against config.json.

        Raises:
            UserError: no supported MoE, damaged files, tensors missing, unknown or of another shape.
        """
        index = CheckpointIndex.open(directory)
        spec = moe_family_of(index.config, str(index.directory / "config.json"))
        assert spec.router is not None, "a family with experts has a router"
        layers = spec.moe_layers(index.config)
        tensors = _layout(index, spec, layers[0])
        source = cls(index, spec, spec.dims(index.config), spec.router(index.config), tensors, layers)
        for layer in source.layers:
            source._check_layer(layer)
        return source

    @cached_property
    def fingerprint(self) -> str:
        """Hash that tells these weights from others (CheckpointIndex.fingerprint)."""
        return self.index.fingerprint()

    def facts(self) -> dict[str, Any]:
        """What manifests and plans record of the source."""
        return {
            "path": str(self.index.directory),
            "fingerprint": self.fingerprint,
            "family": self.spec.name,
            "experts": self.dims.experts,
            "active": self.dims.active,
        }

    def layer_prefix(self, layer: int) -> str:
        """What the names of all tensors of a layer begin with."""
        return self.tensors.block.partition("{layer}.")[0] + f"{layer}."

    def block_prefix(self, layer: int) -> str:
        """What the names of all tensors of the layer's MoE block begin with."""
        return self.tensors.block.format(layer=layer)

    def block_names(self, layer: int) -> list[str]:
        """All tensors of the layer's MoE block."""
        return list(self.block_shapes(layer))

    def block_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """All tensors of the layer's MoE block, with the shapes that config.json implies."""
        dims, tensors = self.dims, self.tensors
        return {
            **tensors.router_shapes(layer, dims.hidden_size, dims.experts),
            **tensors.experts.shapes(layer, dims.hidden_size, dims.expert_width, dims.experts),
            **tensors.shared_shapes(layer, dims.hidden_size, dims.shared_width),
        }

    def beyond_layers(self) -> list[str]:
        """Tensors of layers the stock model does not run (multi-token prediction): no part of the dense result."""
        stem = self.layer_prefix(0).removesuffix("0.")
        numbers = {name: name.removeprefix(stem).partition(".")[0] for name in self.index.tensors if name.startswith(stem)}
        return [name for name, number in numbers.items() if int(number) >= self.dims.layers]

    def _require_plain(self, name: str) -> None:
        dtype = self.index.tensors[name].dtype
        if dtype not in ("BF16", "F16", "F32", "F64") and not self.tensors.experts.mxfp4:
            raise UserError(
                f"{self.index.directory}: {name} is quantised ({dtype})",
                "weights in bfloat16, float16 or float32 (or GPT-OSS's MXFP4)",
                "dequantise the checkpoint first",
            )

    def _check_layer(self, layer: int) -> None:
        known = self.block_shapes(layer)
        for name, shape in known.items():
            self.index.require_shape(name, shape)
            self._require_plain(name)
        prefix = self.block_prefix(layer)
        unknown = sorted(name for name in self.index.tensors if name.startswith(prefix) and name not in known)
        if unknown:
            raise UserError(
                f"{self.index.directory}: {unknown[0]} ({len(unknown)} such tensors in layer {layer})",
                f"only router, {self.dims.experts} experts and shared experts in a MoE block of {self.spec.name}, as config.json says",
                "check that config.json and the weights are of the same model",
            )


def _layout(index: CheckpointIndex, spec: FamilySpec, layer: int) -> MoeTensors:
    """The family's layout whose router and first expert are there; the first one (whose absence is then told) when none is."""
    for tensors in spec.moe:
        names = [tensors.router.format(layer=layer), *tensors.experts.names(layer)]
        if all(name in index.tensors for name in names):
            return tensors
    return spec.moe[0]
