"""Config of `plan`: the keys of `distill` that sizes depend on, and the hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source
from megatron_moe2dense.trainer.config import (
    BatchConfig,
    DistillConfig,
    Fp8Config,
    OptimConfig,
    ParallelConfig,
    TeacherConfig,
    TrainConfig,
    TrainedParts,
    teacher_block,
)
from megatron_moe2dense.trainer.data.config import TrainDataConfig
from megatron_moe2dense.trainer.losses import Loss, losses

NODE = 8  # SXM parts come so many to a node


class HardwareConfig(Config):
    """The machine."""

    gpu: Literal["H100", "H200", "B200", "A100"] = key("H100", "kind of GPU: the SXM part of that name")
    gpus: int = key(8, "GPUs of a node; more than 8 with nodes: 1 are nodes of 8", "GPUs", gt=0)
    nodes: int = key(1, "nodes", "nodes", gt=0)
    network: float | None = key(None, "bandwidth between nodes, of each GPU and direction; null: as in the vendor's DGX", "bytes/s", gt=0)
    price: float | None = key(
        None, "price of a GPU-hour; null: a round list price of the kind (an assumption, in docs/operations.md)", "USD", gt=0
    )
    efficiency: float = key(0.36, "share of the data sheet's rates, FLOP/s and bytes/s alike, that a run reaches", "fraction", gt=0, le=1)
    reserve: float = key(0.08, "share of the GPU's memory kept free for fragmentation", "fraction", ge=0, lt=1)

    @model_validator(mode="after")
    def _whole_nodes(self) -> HardwareConfig:
        if self.gpus > NODE and (self.nodes > 1 or self.gpus % NODE):
            raise ValueError(f"gpus: {self.gpus}, but a node has at most {NODE}: give nodes of {NODE}, or their total with nodes: 1")
        return self

    def on_node(self) -> int:
        """GPUs of a node."""
        return min(self.gpus, NODE)

    def nodes_in_all(self) -> int:
        """However they were given."""
        return self.world() // self.on_node()

    def world(self) -> int:
        """GPUs in all."""
        return self.gpus * self.nodes


class TextConfig(Config):
    """What sizes need to know of the text."""

    sequence_length: int = key(2048, "length of one sample", "tokens", gt=1)


class LengthConfig(Config):
    """What hours and memory need to know of the run."""

    steps: int | None = key(None, "optimizer steps", "steps", gt=0)
    tokens: int | None = key(None, "tokens to train on", "tokens", gt=0)
    parts: TrainedParts = key("all", "what is trained of the student, as in distill")


class PlanConfig(Config):
    """`moe2dense plan`. A YAML of `distill` is one of `plan` too: what sizes do not depend on is left to `distill`."""

    plain: ClassVar[Mapping[str, str]] = {"teacher": "path"}

    student: Annotated[str, Source("config")] = key(..., "Hugging Face directory of the student, or its config.json")
    teacher: Annotated[TeacherConfig | None, Source("config")] = key(
        ..., "the frozen teacher: its directory or config.json, or this block; null: none"
    )
    hardware: HardwareConfig = key(HardwareConfig(), "the machine")
    parallel: ParallelConfig | None = key(None, "judge this layout; null: suggest the best ones")
    batch: BatchConfig | None = key(None, "batch sizes; null: 256 sequences a step, and the micro-batch that is fastest")
    data: TextConfig = key(TextConfig(), "training text")
    train: LengthConfig | None = key(None, "length of the run, for its hours and cost; null: not said")
    loss: Annotated[Loss, *losses.field] | None = key(None, "loss block; null: forward_kl with a teacher, cross_entropy without")
    dtype: Literal["float32", "bfloat16"] = key("bfloat16", "compute type; bfloat16 keeps float32 master weights")
    fp8: Fp8Config | None = key(None, "matrix products of the student in FP8, at twice the rate of bfloat16; null: none")
    optim: OptimConfig = key(OptimConfig(), "optimizer: whose moments take memory")
    suggestions: int = key(8, "layouts in the table", "layouts", gt=0)
    report: str | None = key(None, "JSON file to write beside the tables; null: none")

    @model_validator(mode="before")
    @classmethod
    def _of_a_run(cls, raw: Any) -> Any:
        """Leave out the keys of `distill` that no size depends on; a key that `distill` does not know stays, and is refused."""
        raw = teacher_block(raw)
        if not isinstance(raw, dict):
            return raw
        found = _without(raw, set(DistillConfig.model_fields) - set(cls.model_fields))
        if isinstance(found.get("data"), dict):
            found["data"] = _without(found["data"], set(TrainDataConfig.model_fields) - set(TextConfig.model_fields))
        if isinstance(found.get("train"), dict):
            found["train"] = _without(found["train"], set(TrainConfig.model_fields) - set(LengthConfig.model_fields))
        return found

    @model_validator(mode="after")
    def _settings_have_effect(self) -> PlanConfig:
        if self.loss is not None and self.loss.needs_teacher and self.teacher is None:
            raise ValueError(f"loss {self.loss.method_name()} needs a teacher")
        if self.parallel is not None:
            self.optim.require_whole_matrices(self.parallel)
        if self.dtype == "float32":
            raise ValueError("dtype float32: the hardware table has bfloat16 rates alone")
        if self.fp8 is not None and (self.hardware.gpu == "A100" or (self.fp8.recipe == "mxfp8" and self.hardware.gpu != "B200")):
            raise ValueError(f"fp8: {self.fp8.recipe}: {self.hardware.gpu} has no tensor cores for it")
        return self

    def resolved_loss(self) -> Loss:
        """The loss, with its default filled in."""
        return self.loss or losses["cross_entropy" if self.teacher is None else "forward_kl"]()

    def world(self) -> int:
        """GPUs in all."""
        return self.hardware.world()


def _without(raw: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}
