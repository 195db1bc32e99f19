"""Config blocks of inspect, calibrate, score and convert. No torch."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source
from megatron_moe2dense.common.sizes import Bytes
from megatron_moe2dense.families.widths import RUNS_EVERYWHERE
from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.neurons import NeuronSelector, selectors
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import chosen_statistics
from megatron_moe2dense.surgery.types import Grouper, Scaler, Scorer
from megatron_moe2dense.tokens.config import TokensConfig


def pad_to_key() -> Any:
    """What `convert` and all that size its result have."""
    what = "the width of the dense FFN is a multiple of it, by neurons of zeros; 32: the smallest that runs everywhere; 256: for k-quants"
    return key(RUNS_EVERYWHERE, what, "neurons", gt=0)


with warnings.catch_warnings():
    # The key is called `json`; pydantic 2 warns that it hides its own deprecated BaseModel.json().
    warnings.filterwarnings("ignore", message='Field name "json"')

    class InspectConfig(Config):
        """`moe2dense inspect`."""

        source: Annotated[str, Source("small")] = key(..., "Hugging Face checkpoint directory")
        keep: int | None = key(None, "experts of width in the dense FFN; null: the router's top-k", "experts", gt=0)
        text_only: bool = key(False, "the dense result of a language model without the images and sound around it")
        pad_to: int = pad_to_key()
        download: bool = key(
            False, "of a model by name: fetch its small files and the headers of its weights where they are not in the cache"
        )
        json: bool = key(False, "print one JSON object instead of the table")  # type: ignore[assignment]


class CalibrateConfig(Config):
    """`moe2dense calibrate`."""

    source: Annotated[str, Source()] = key(..., "Hugging Face checkpoint directory of the MoE")
    output: str = key(..., "directory to write stats.safetensors and moe2dense.json to")
    data: TokensConfig = key(..., "the calibration text")
    batch_tokens: int = key(8192, "tokens of one forward pass, rounded down to whole windows, at least one", "tokens", gt=0)
    statistics: str | list[str] = key("all", '"all" or a list of statistic names')
    device: str = key("auto", "torch device; auto: cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = key("auto", "compute type; auto: float32 on cpu, bfloat16 on cuda")
    memory_budget: Bytes = key("8GiB", "hidden states of a process beyond this live in a file beside the output", "bytes", gt=0)
    overwrite: bool = key(False, "replace an existing output")

    @field_validator("statistics")
    @classmethod
    def _known_statistics(cls, value: str | list[str]) -> str | list[str]:
        chosen_statistics(value)
        return value


class ScoreConfig(Config):
    """`moe2dense score`."""

    statistics: str = key(..., "output directory of `moe2dense calibrate`")
    keep: int | None = key(None, "experts to keep in each layer; null: the router's top-k", "experts", gt=0)
    score: Annotated[Scorer, *scorers.field] = key({"method": "do_acp"}, "scoring method")
    compare: bool | list[str] = key(
        True, "overlap of the kept sets with other scoring methods; true: the seven of docs/method.md, or a list of ids"
    )
    output: str | None = key(None, "file to write; null: <statistics>/ranking.json")
    overwrite: bool = key(False, "replace an existing file")

    @field_validator("compare")
    @classmethod
    def _known_methods(cls, value: bool | list[str]) -> bool | list[str]:
        for name in value if isinstance(value, list) else ():
            scorers[name]  # ValueError with a suggestion
        return value


class SelectConfig(Config):
    """`moe2dense select`: neurons out of all experts of a layer (ours)."""

    source: Annotated[str, Source()] = key(..., "Hugging Face checkpoint directory of the MoE")
    statistics: str = key(..., "output directory of `moe2dense calibrate`")
    output: str = key(..., "directory to write plan.json to, for `convert plan=`")
    groups: int | None = key(None, "width of the dense FFN, in experts; null: the router's top-k", "experts", gt=0)
    pad_to: int = pad_to_key()
    select: Annotated[NeuronSelector, *selectors.field] = key({"method": "ols"}, "how neurons are chosen")
    data: TokensConfig | None = key(None, "calibration text; required by methods that look at activations, and only by them")
    batch_tokens: int = key(8192, "tokens of one forward pass, rounded down to whole windows, at least one", "tokens", gt=0)
    device: str = key("auto", "torch device; auto: cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = key("auto", "compute type; auto: float32 on cpu, bfloat16 on cuda")
    memory_budget: Bytes = key("8GiB", "hidden states of a process beyond this live in a file beside the output", "bytes", gt=0)
    overwrite: bool = key(False, "replace an existing output")

    @model_validator(mode="after")
    def _text_where_it_is_read(self) -> SelectConfig:
        reads, name = self.select.reads_text, self.select.method_name()
        if reads and self.data is None:
            raise ValueError(f"select.method={name} needs text: give data.path")
        if not reads and self.data is not None:
            raise ValueError(f"data has no effect with select.method={name}, which reads statistics alone; remove it")
        return self


class ReconstructConfig(Config):
    """All matrices of a dense FFN trained by gradient, each layer alone, on what its refit was solved on (ours)."""

    epochs: int = key(24, "passes over the text; the one that is best on the held-out tenth is kept", "epochs", gt=0)
    lr: float = key(3e-3, "peak learning rate of AdamW: a warm-up over a tenth of the updates, then a cosine", gt=0)
    batch_tokens: int = key(2048, "tokens of an update: whole windows, at least one of every process", "tokens", gt=0)


class RefitConfig(Config):
    """The down projection solved in closed form, and from there the whole FFN by gradient (ours)."""

    method: Literal["ridge"] = key("ridge", "ridge regression of the teacher's outputs on the dense FFN's neurons")
    ridge: float | Literal["auto"] = key(
        "auto", "relative to the mean of the diagonal; auto: the best of 1e-7 ... 1e-1 on a held-out tenth of the text, layer by layer"
    )
    mode: Literal["parallel", "sequential"] = key(
        "sequential",
        "parallel: each layer on the teacher's own inputs; sequential: on those of the student made so far, to the teacher's hidden states",
    )
    shared: Literal["fixed", "refitted"] = key("fixed", "the shared experts' neurons; no effect where a family has none")
    reconstruct: ReconstructConfig | None = key(None, "train the FFN from there; null: gate and up projections stay as they are")
    batch_tokens: int = key(8192, "tokens of one forward pass, rounded down to whole windows, at least one", "tokens", gt=0)
    device: str = key("auto", "torch device; auto: cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = key("auto", "compute type; auto: float32 on cpu, bfloat16 on cuda")

    @field_validator("ridge")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value < 0:
            raise ValueError("ridge must be 0 or more")
        return value


class ConvertConfig(Config):
    """`moe2dense convert`: from statistics and methods, or from a plan.json that an earlier run wrote."""

    source: Annotated[str, Source()] = key(..., "Hugging Face checkpoint directory of the MoE")
    output: str | None = key(None, "directory to write the dense checkpoint and plan.json to; required without outputs")
    statistics: str | None = key(None, "output directory of `moe2dense calibrate`; required without a plan, only checked with one")
    keep: int | None = key(None, "experts to keep in each layer; null: groups", "experts", gt=0)
    groups: int | None = key(None, "slices of the dense FFN, each as wide as one expert; null: the router's top-k", "slices", gt=0)
    score: Annotated[Scorer | None, *scorers.optional_field] = key(None, "scoring method; do_acp without a plan")
    group: Annotated[Grouper | None, *groupers.optional_field] = key(None, "grouping method; only for keep > groups")
    scale: Annotated[Scaler | None, *scalers.optional_field] = key(None, "scaling method; uniform without a plan")
    plan: str | None = key(None, "plan.json that takes the place of score, group and scale")
    refit: RefitConfig | None = key(None, "solve the down projections on calibration text; needs data")
    data: TokensConfig | None = key(None, "the text of the refit; with a plan that has one, the same text at another place")
    outputs: dict[str, str] | None = key(
        None, "several outputs in one pass over the source, {directory: plan.json, ...}; takes the place of output and plan", min_length=1
    )
    text_only: bool = key(False, "convert the language model of a model for images or sound alone; they are carried over otherwise")
    pad_to: int = pad_to_key()
    shard_size: Bytes = key("4GiB", "largest .safetensors file of an output", "bytes", gt=0)
    memory_budget: Bytes = key("4GiB", "memory for layers in the making and waiting writes; the plan needs a part of it", "bytes", gt=0)
    overwrite: bool = key(False, "replace an existing output")

    @model_validator(mode="before")
    @classmethod
    def _default_methods(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("plan") is None and data.get("outputs") is None:
            return {"score": {"method": "do_acp"}, "scale": {"method": "uniform"}, **data}
        return data

    @model_validator(mode="after")
    def _plan_or_methods(self) -> ConvertConfig:
        methods = {"score": self.score, "group": self.group, "scale": self.scale}
        if self.refit is not None and self.data is None:
            raise ValueError("refit needs text: give data.path")
        if self.data is not None and self.refit is None and self.plan is None:
            raise ValueError("data has no effect without refit; remove it, or add refit.method=ridge")
        if (self.output is None) == (self.outputs is None):
            raise ValueError("output or outputs must be given, one of the two")
        if self.outputs is not None:
            others = {**methods, "plan": self.plan, "keep": self.keep, "groups": self.groups}
            given = [name for name, value in others.items() if value is not None]
            if given:
                raise ValueError(f"outputs and {', '.join(given)} are both given: each output has its own plan; drop one side")
            return self
        if self.plan is not None:
            given = [name for name, method in methods.items() if method is not None]
            if given:
                raise ValueError(f"plan and {', '.join(given)} are both given: the plan already holds them; drop one side")
            return self
        missing = [name for name, value in {**methods, "statistics": self.statistics}.items() if value is None and name != "group"]
        if missing:
            raise ValueError(f"without a plan, {' and '.join(missing)} must be given")
        return self

    def jobs(self) -> list[ConvertConfig]:
        """The conversions to do, each as a run of its own would have it: an output is the same whichever way it is made."""
        if self.outputs is None:
            return [self]
        return [self.model_copy(update={"output": to, "plan": plan, "outputs": None}) for to, plan in self.outputs.items()]
