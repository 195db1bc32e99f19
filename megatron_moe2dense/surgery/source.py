"""A MoE checkpoint as the surgery sees it: family data beside the opened index, every tensor's presence and shape checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import Dims, ExpertTensors, FamilySpec, Router, moe_family_of


@dataclass(frozen=True)
class MoeSource:
    """An opened MoE checkpoint. layers: numbers of the layers with experts."""

    index: CheckpointIndex
    spec: FamilySpec
    dims: Dims
    router: Router
    layers: tuple[int, ...]

    @classmethod
    def open(cls, directory: str | Path) -> MoeSource:
        """Read headers and check router and expert tensors against config.json.

        Raises:
            UserError: no supported MoE, damaged files, tensors missing, unknown or of another shape.
        """
        index = CheckpointIndex.open(directory)
        spec = moe_family_of(index.config, str(index.directory / "config.json"))
        assert spec.router is not None, "a family with experts has a router"
        source = cls(index, spec, spec.dims(index.config), spec.router(index.config), spec.moe_layers(index.config))
        for layer in source.layers:
            source._check_layer(layer)
        return source

    @property
    def experts(self) -> ExpertTensors:
        """Name templates of the experts."""
        assert self.spec.experts is not None, "moe_family_of returned a family without experts"
        return self.spec.experts

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
        return self.experts.gate.partition("{layer}.")[0] + f"{layer}."

    def block_prefix(self, layer: int) -> str:
        """What the names of all tensors of the layer's MoE block begin with."""
        return self.layer_prefix(layer) + self.experts.module + "."

    def router_name(self, layer: int) -> str:
        """The router matrix."""
        return self.router.weight.format(layer=layer)

    def expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """The gate, up and down tensors of one expert."""
        gate, up, down = (t.format(layer=layer, expert=expert) for t in (self.experts.gate, self.experts.up, self.experts.down))
        return gate, up, down

    def block_names(self, layer: int) -> list[str]:
        """All tensors of the layer's MoE block that the family knows."""
        names = [name for expert in range(self.dims.experts) for name in self.expert_names(layer, expert)]
        return [self.router_name(layer), *names]

    def _check_layer(self, layer: int) -> None:
        hidden, width = self.dims.hidden_size, self.dims.expert_width
        self.index.require_shape(self.router_name(layer), (self.dims.experts, hidden))
        for expert in range(self.dims.experts):
            for name, shape in zip(self.expert_names(layer, expert), ((width, hidden), (width, hidden), (hidden, width)), strict=True):
                self.index.require_shape(name, shape)
        known, prefix = set(self.block_names(layer)), self.block_prefix(layer)
        unknown = sorted(name for name in self.index.tensors if name.startswith(prefix) and name not in known)
        if unknown:
            raise UserError(
                f"{self.index.directory}: {unknown[0]} ({len(unknown)} such tensors in layer {layer})",
                f"only router and {self.dims.experts} experts in a MoE block of {self.spec.name}",
                "check that config.json and the weights are of the same model",
            )
