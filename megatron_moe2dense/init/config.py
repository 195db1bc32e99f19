"""Config of `init`."""

from __future__ import annotations

from typing import Annotated

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source
from megatron_moe2dense.operations.plan.config import HardwareConfig


class InitConfig(Config):
    """`moe2dense init`."""

    source: Annotated[str, Source()] = key(..., "Hugging Face directory of the MoE")
    text: str | list[str] = key(..., "training text: txt, jsonl or parquet files, or folders of them")
    output: str | None = key(None, "folder to write the YAMLs and run.sh to, beside their results; null: out/<name of the source>")
    hardware: HardwareConfig = key(HardwareConfig(), "the machine that distills")
    keep: int | None = key(None, "experts of width in the dense FFN; null: the router's top-k", "experts", gt=0)
    tokens: int = key(4_000_000_000, "tokens to distill on, at most (the paper's 4B); fewer where the text has fewer", "tokens", gt=0)
    sequence_length: int | None = key(None, "length of a sample; null: 2048, or what the model knows", "tokens", gt=1)
    overwrite: bool = key(False, "replace the YAMLs and run.sh of an earlier init; results are left alone")
