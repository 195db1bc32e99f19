"""Grouping methods, one file each, found by name (`group: {method: NAME}`). numpy and scipy only."""

from megatron_moe2dense.common.registry import Registry
from megatron_moe2dense.surgery.types import Grouper

groupers: Registry[Grouper] = Registry("group", __name__)
