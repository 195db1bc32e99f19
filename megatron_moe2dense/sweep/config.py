"""Config blocks of `moe2dense sweep`. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source
from megatron_moe2dense.common.sizes import Bytes
from megatron_moe2dense.surgery.config import ReconstructConfig, RefitConfig, pad_to_key
from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.neurons import NeuronSelector, selectors
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import METHODS, scorers
from megatron_moe2dense.surgery.types import Grouper, Scaler, Scorer
from megatron_moe2dense.tokens.config import TokensConfig

# The five of docs/method.md#groups-merging-scaling.
GROUPINGS = ("weight_cluster", "output_cluster", "router_cluster", "anchor", "round_robin")
SCALINGS = ("uniform", "proportional")


def _blocks(names: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"method": name} for name in names]


def named_blocks(value: Any) -> Any:
    """A list in which methods may stand by their names alone."""
    return [{"method": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


class GridConfig(Config):
    """The axes; every combination is a point. Default: the paper's 7 scorings x 5 groupings x 2 scalings x K."""

    keep: list[int] | None = key(None, "experts to keep, K; null: the router's top-k, doubled up to all experts", "experts", min_length=1)
    groups: list[int] | None = key(None, "slices of the dense FFN; null: the router's top-k; points with keep < groups are left out")
    score: list[Annotated[Scorer, *scorers.field]] = key(_blocks(METHODS), "scoring methods, names or blocks", min_length=1)
    group: list[Annotated[Grouper, *groupers.field]] = key(_blocks(GROUPINGS), "grouping methods, names or blocks", min_length=1)
    scale: list[Annotated[Scaler, *scalers.field]] = key(_blocks(SCALINGS), "scaling methods, names or blocks", min_length=1)

    refit: list[RefitConfig | None] = key([None], "refits of the down projections; null: none (needs refit_data)", min_length=1)

    @field_validator("score", "group", "scale", "refit", mode="before")
    @classmethod
    def _names_are_blocks(cls, value: Any) -> Any:
        return named_blocks(value)

    @model_validator(mode="after")
    def _no_value_twice(self) -> GridConfig:
        for name, values in self.model_dump(mode="json").items():
            twice = [value for value in values or () if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} holds {twice[0]} twice")
        if min([*(self.keep or ()), *(self.groups or ())], default=1) < 1:
            raise ValueError("keep and groups must be at least 1")
        return self


class CandidatesConfig(GridConfig):
    """The axes of `auto`."""

    refit: list[RefitConfig | None] = key(_blocks(("ridge",)), "refits candidates are judged with, in parallel mode until the last round")


class BudgetConfig(Config):
    """What the dense model may be at most; neither: as wide as the MoE's active experts."""

    parameters: int | None = key(None, "parameters of the whole model", "parameters", gt=0)
    bytes: Bytes | None = key(None, "bytes of its weights in the source's dtype", "bytes", gt=0)

    @model_validator(mode="after")
    def _one_of_them(self) -> BudgetConfig:
        if self.parameters is not None and self.bytes is not None:
            raise ValueError("parameters and bytes are both given: one budget decides the width")
        return self


class JudgingConfig(Config):
    """What `sweep` and `auto` have in common: dense models in memory, judged against the MoE on held-out text."""

    source: Annotated[str, Source()] = key(..., "Hugging Face checkpoint directory of the MoE")
    statistics: str = key(..., "output directory of `moe2dense calibrate`")
    data: TokensConfig = key(..., "held-out tokens, to judge on")
    batch_tokens: int = key(4096, "tokens through a layer at once: whole windows, at least one", "tokens", gt=0)
    pad_to: int = pad_to_key()
    memory_budget: Bytes = key("8GiB", "for hidden states: decides how many models are evaluated in one pass", "bytes", gt=0)
    device: str = key("auto", "torch device: cpu, cuda, cuda:1, ...; auto: cuda where there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "weights and compute; logits are compared in float32 always")
    overwrite: bool = key(False, "replace an existing output")


class AutoConfig(JudgingConfig):
    """`moe2dense auto`: the best plan for a budget, by successive halving (ours)."""

    output: str = key(..., "directory of plan.json, for `convert plan=`, and auto.json")
    refit_data: TokensConfig = key(..., "calibration text, to choose neurons and solve down projections on")
    budget: BudgetConfig = key({}, "the size of the dense model")
    grid: CandidatesConfig = key({}, "candidates; groups follow from the budget")
    select: list[Annotated[NeuronSelector, *selectors.field]] = key(
        _blocks(("energy", "ols")), "ways to choose neurons, candidates too, with every refit of the grid"
    )
    reconstruct: ReconstructConfig | None = key(
        None, "judge the best once more with its FFNs trained from there, in sequential mode, and keep that where it is better; null: no"
    )
    halvings: int = key(2, "rounds before the last one; each keeps one in `eta`, on `eta` times as much text as the one before", ge=0)
    eta: int = key(4, "see halvings", gt=1)

    @field_validator("select", mode="before")
    @classmethod
    def _names_are_blocks(cls, value: Any) -> Any:
        return named_blocks(value)

    @model_validator(mode="after")
    def _settings_have_effect(self) -> AutoConfig:
        if self.grid.groups is not None:
            raise ValueError("grid.groups follows from the budget; remove it")
        return self


class SweepConfig(JudgingConfig):
    """`moe2dense sweep`."""

    output: str = key(..., "directory of records.jsonl and summary.json; an unfinished sweep of the same config is resumed")
    grid: GridConfig = key({}, "the axes of the sweep")
    refit_data: TokensConfig | None = key(None, "calibration text of the grid's refits; not the held-out tokens")
    slice: str = key("1/1", 'this process does part i of n, "i/n"; any number of processes may write to one output')

    @field_validator("slice")
    @classmethod
    def _part_of(cls, value: str) -> str:
        match = re.fullmatch(r"(\d+)/(\d+)", value)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError("a slice is written i/n with 1 <= i <= n, e.g. 3/8")
        return value

    @model_validator(mode="after")
    def _settings_have_effect(self) -> SweepConfig:
        if self.overwrite and self.part[1] > 1:
            raise ValueError("overwrite=true with a slice: the processes would delete each other's records; remove the output first")
        if any(self.grid.refit) and self.refit_data is None:
            raise ValueError("grid.refit needs text: give refit_data.path")
        if self.refit_data is not None and not any(self.grid.refit):
            raise ValueError("refit_data has no effect without a refit in grid.refit; remove it")
        return self

    @property
    def part(self) -> tuple[int, int]:
        """(i, n) of the slice, i from 1."""
        part, count = self.slice.split("/")
        return int(part), int(count)
