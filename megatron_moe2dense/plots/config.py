"""Config block of `moe2dense plot`."""

from __future__ import annotations

from megatron_moe2dense.common.config import Config, key


class PlotConfig(Config):
    """`moe2dense plot`."""

    records: list[str] = key(
        ..., "records.jsonl, metrics.jsonl, ranking.json, plan.json, stats.safetensors, or directories that hold them", min_length=1
    )
    output: str = key(..., "directory of the PNG and SVG figures")
    overwrite: bool = key(False, "replace an existing output")
