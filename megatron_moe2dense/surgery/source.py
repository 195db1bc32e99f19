"""A MoE checkpoint as the surgery sees it: the stock class and what it says, beside the opened files; every tensor accounted for."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.dense import DenseForm, has_experts, require_known
from megatron_moe2dense.families.disk import Disk, ReadTensor
from megatron_moe2dense.families.ffn import Ffn, FfnPlace, Gating, gating_of
from megatron_moe2dense.families.probe import BlockFacts, probe
from megatron_moe2dense.families.spec import Dims
from megatron_moe2dense.families.stock import MoePlace, Stock
from megatron_moe2dense.families.widths import RUNS_EVERYWHERE
from megatron_moe2dense.surgery.densify import Units
from megatron_moe2dense.surgery.plan import ROUTED_FACTOR


@dataclass(frozen=True, eq=False)
class MoeSource:
    """An opened MoE checkpoint. account: of its tensors. text_only: whether what is around the language model stays behind. pad_to: what
    the width of the dense FFN is a multiple of."""

    account: Account
    facts_of_block: BlockFacts
    text_only: bool = False
    pad_to: int = RUNS_EVERYWHERE

    @classmethod
    def open(cls, directory: str | Path, text_only: bool = False, pad_to: int = RUNS_EVERYWHERE) -> MoeSource:
        """Read headers and check the tensors against what the stock class holds. text_only, pad_to: keys of `convert`.

        Raises:
            UserError: no MoE with an exact dense form, damaged files, tensors missing, unknown or of another shape.
        """
        index = CheckpointIndex.open(directory)
        return cls.of(index, Stock.read(index.directory), text_only, pad_to)

    @classmethod
    def of(cls, index: CheckpointIndex, stock: Stock, text_only: bool = False, pad_to: int = RUNS_EVERYWHERE) -> MoeSource:
        """As `open`, of files and a class that were read already."""
        if not has_experts(stock):
            raise UserError(f"{index.directory}/config.json: {stock.name} has no layer of experts", "a MoE", "point to the MoE checkpoint")
        require_known(stock)
        account = Account.of(index, stock)
        return cls(account, probe(stock, stock.moe[max(stock.moe)]), text_only, pad_to)

    @property
    def index(self) -> CheckpointIndex:
        """The opened files."""
        return self.account.index

    @property
    def stock(self) -> Stock:
        """Its class."""
        return self.account.stock

    @property
    def values(self) -> Values:
        """Its tensors, by name in the files."""
        return self.account.values

    @property
    def disk(self) -> Disk:
        """Its tensors, by name in the class."""
        return self.account.disk

    @cached_property
    def fingerprint(self) -> str:
        """Hash that tells these weights from others (CheckpointIndex.fingerprint)."""
        return self.index.fingerprint()

    @property
    def family(self) -> str:
        """The model_type of its class."""
        return self.stock.name

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts."""
        return tuple(self.stock.moe)

    @cached_property
    def form(self) -> DenseForm:
        """What it becomes; the language model alone where a stock class holds only that. UserError when none holds it exactly."""
        if self.stock.wrapped and not self.text_only:
            with contextlib.suppress(UserError):
                return DenseForm(self.stock)
        return DenseForm(self.stock, alone=True)

    def require_whole(self) -> None:
        """UserError when the dense result would lack what is around the language model, and nobody asked for that."""
        if self.form.alone and not self.text_only:
            raise UserError(
                f"{self.index.directory}: no stock class holds a dense {self.family} inside a {self.stock.model.config.model_type}",
                "a source whose dense result keeps what is around its language model",
                "text_only=true converts the language model alone",
            )

    @cached_property
    def seam(self) -> Literal["block", "experts"]:
        """What a dense FFN takes the place of: the block, or, where that does more than add shared experts, the experts in it."""
        facts = self.facts_of_block
        whole = bool(self._first.block) and facts.routed_factor is not None
        return "block" if whole and self.form.exception.into is None and not (self._first.shared and self.form.has_shared) else "experts"

    @property
    def _first(self) -> MoePlace:
        return next(iter(self.stock.moe.values()))

    @cached_property
    def dims(self) -> Dims:
        """Sizes of the model."""
        return replace(self.stock.dims, active=self.facts_of_block.active)

    def facts(self) -> dict[str, Any]:
        """What manifests and plans record of the source."""
        return {
            "path": str(self.index.directory),
            **hub.revision_of(self.index.directory),
            "fingerprint": self.fingerprint,
            "family": self.family,
            "experts": self.dims.experts,
            "active": self.dims.active,
            **self.factor_facts(),
        }

    def factor_facts(self) -> dict[str, float]:
        """What tells statistics and plans whose gates hold the factor behind the experts from those of versions that left it out."""
        return {} if self.routed_factor == 1.0 else {ROUTED_FACTOR: self.routed_factor}

    def reader(self, reader: CheckpointReader, finite: bool = True) -> ReadTensor:
        """Reads the files' tensors as numbers; those of an FFN, or of all experts of a layer, in one type."""
        as_stored = self.values.reader(reader, finite)
        return lambda name, rows: as_stored(name, rows).to(self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor of the files is read."""
        return self._widened.get(name) or self.values.dtype(name)

    @cached_property
    def _widened(self) -> dict[str, torch.dtype]:
        """Of FFNs whose tensors have several types: the one that holds all their values. Whichever experts a plan keeps, it is the same."""
        found = {}
        for layer in range(len(self.stock.layers)):
            place = self.stock.moe.get(layer)
            for ffn in (*self.stock.ffns(layer).values(), *(() if place is None else (place.experts, *place.shared))):
                on_disk = [each for name in ffn.names for each in self.disk.names_of(self.stock.in_model(layer, name))]
                types = {self.values.dtype(name) for name in on_disk}
                if len(types) > 1:
                    found |= dict.fromkeys(on_disk, reduce(torch.promote_types, types))
        return found

    def ffn(self, read: ReadTensor, layer: int, place: FfnPlace, expert: int | None = None) -> Ffn:
        """One FFN of a layer, in the dtype it is stored in (quantised: bfloat16)."""
        shapes = self.stock.layer_shapes[layer]

        def tensor(name: str) -> torch.Tensor:
            whole = self.stock.in_model(layer, name)
            if expert is None:
                return self.disk.tensor(whole, read)
            if place.flat:
                width, _ = place.sizes(shapes)
                return self.disk.tensor(whole, read, slice(expert * width, (expert + 1) * width))
            return self.disk.tensor(whole, read, slice(expert, expert + 1))[0]

        return place.read(tensor)

    def expert(self, read: ReadTensor, layer: int, expert: int) -> Ffn:
        """One expert of a MoE layer."""
        return self.ffn(read, layer, self.stock.moe[layer].experts, expert)

    def shared(self, read: ReadTensor, layer: int) -> Ffn | None:
        """The shared experts of a MoE layer, as one FFN, where they become neurons of the dense one; else None."""
        places = self.stock.moe[layer].shared
        if not places or not self.form.absorbs_shared:
            return None
        assert len(places) == 1, "stock classes hold shared experts as one FFN"
        return self.ffn(read, layer, places[0])

    @property
    def routed_factor(self) -> float:
        """What the block multiplies the sum of its experts by; 1 where it does anything else with it."""
        return 1.0 if self.facts_of_block.routed_factor is None else self.facts_of_block.routed_factor

    @property
    def seam_units(self) -> Units:
        """Of what a plan puts into the seam: its scales are weights in the block's output. A block that stays multiplies by its factor
        itself, and has its shared experts."""
        return Units(1.0, self.facts_of_block.shared_factor) if self.seam == "block" else Units(1.0 / self.routed_factor)

    def gating(self, layer: int | None = None) -> Gating:
        """Of the experts of a layer, the first MoE layer by default."""
        place = self._first if layer is None else self.stock.moe[layer]
        return gating_of(self.stock.layers[place.layer].get_submodule(place.experts.path), place.experts)

    def stored(self, layer: int, names: tuple[str, ...] | list[str]) -> list[str]:
        """The tensors in the files that hold parameters of a layer (names in the layer)."""
        on_disk = [each for name in names for each in self.disk.names_of(self.stock.in_model(layer, name))]
        return [part for name in dict.fromkeys(on_disk) for part in self.values.stored(name)]

    def expert_names(self, layer: int) -> list[str]:
        """The tensors in the files that hold the experts of a MoE layer."""
        return self.stored(layer, self.stock.moe[layer].experts.names)

    def shared_names(self, layer: int) -> list[str]:
        """The tensors in the files that hold the shared experts of a MoE layer and their gate."""
        place = self.stock.moe[layer]
        gate = [] if place.shared_gate is None else [place.shared_gate]
        return self.stored(layer, [*(name for shared in place.shared for name in shared.names), *gate])

    def router_names(self, layer: int) -> list[str]:
        """The tensors in the files that route in a MoE layer."""
        place, shapes = self.stock.moe[layer], self.stock.layer_shapes[layer]
        known = {*place.experts.names, *(name for shared in place.shared for name in shared.names), place.shared_gate}
        inside = f"{place.block}." if place.block else f"{place.router}."
        return self.stored(layer, [name for name in shapes if name.startswith(inside) and name not in known])
