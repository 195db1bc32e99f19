"""Config of `cache-teacher`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.trainer.config import ParallelConfig, TeacherConfig, teacher_block
from megatron_moe2dense.trainer.data.config import StreamConfig

# Parallel settings that matter to a forward pass of the teacher.
_FORWARD = ("tensor", "pipeline", "teacher_layers_per_stage", "context", "expert", "sequence")
VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class CacheTeacherConfig(Config):
    """`moe2dense cache-teacher`."""

    plain: ClassVar[Mapping[str, str]] = {"teacher": "path"}

    teacher: TeacherConfig = key(..., "the teacher: its Hugging Face directory, or this block")
    output: str = key(..., "directory of the cache")
    data: StreamConfig = key(..., "the training text, as in the run that will read the cache")
    seed: int = key(0, "seed of the data order: train.seed of that run")
    samples: int | None = key(None, "samples to cache, the first ones in the order of training; null: all of one token file", gt=0)
    k: int = key(64, "most likely tokens kept at each position, besides the mass of all others", "tokens", gt=0)
    store: Literal["float16", "bfloat16", "float32"] = key(
        "float16", "type of the log-probabilities; relative error 2^-11 in float16, 2^-8 in bfloat16, 2^-24 in float32"
    )
    shard_samples: int = key(64, "samples in a file; a killed run loses the unfinished ones", "samples", gt=0)
    micro_batch: int = key(1, "sequences per model call and rank", "sequences", gt=0)
    parallel: ParallelConfig = key(ParallelConfig(), "parallelism")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "cuda where there is a GPU, else cpu")
    dtype: Literal["float32", "bfloat16"] = key("bfloat16", "compute type")
    overwrite: bool = key(False, "replace existing output")

    @model_validator(mode="before")
    @classmethod
    def _teacher_block(cls, raw: Any) -> Any:
        return teacher_block(raw)

    @model_validator(mode="after")
    def _settings_have_effect(self) -> CacheTeacherConfig:
        if self.teacher.live is None:
            raise ValueError("teacher.cache is what is written here: give teacher.path alone")
        if self.samples is None and self.data.blend is not None:
            raise ValueError("a blend has no end of its own: give samples (steps x batch.global of the run)")
        fields = {name: field.default for name, field in ParallelConfig.model_fields.items() if name not in _FORWARD}
        changed = [name for name, default in fields.items() if getattr(self.parallel, name) != default]
        if changed:
            raise ValueError(f"parallel.{changed[0]} has no effect: nothing is trained here")
        return self

    @property
    def model(self) -> str:
        """The teacher's directory."""
        assert self.teacher.path is not None, "checked above"
        return self.teacher.path

    def bytes_per_token(self) -> int:
        """Of the cache: k values, k int32 numbers, and the rest's float32 mass."""
        return self.k * (VALUE_BYTES[self.store] + 4) + 4
