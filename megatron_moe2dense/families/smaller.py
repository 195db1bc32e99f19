"""config.json of a dense model that was cut to a smaller shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moe2dense.families.qwen2 import late_layers
from megatron_moe2dense.families.spec import HfConfig


def smaller_config(config: HfConfig, sizes: Mapping[str, int], layers: Sequence[int]) -> dict[str, Any]:
    """The source's config with other sizes. A layer that stays keeps its kind of attention, wherever it moves to.

    Args:
        sizes: config keys and their values, head_dim among them: hidden_size / num_attention_heads need not be it any more.
        layers: numbers of the source's layers that stay.
    """
    types = config.get("layer_types")
    if types is None and config.get("use_sliding_window"):
        types = ["sliding_attention" if slides else "full_attention" for slides in late_layers(config)]
    kinds = {} if types is None else {"layer_types": [types[layer] for layer in layers]}
    return {**config, **sizes, **kinds}
