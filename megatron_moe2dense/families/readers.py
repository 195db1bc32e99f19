"""What a config.json says to every reader. Those older than transformers 5 pass over keys that they do not know, and take their own default
without a word (transformers 4.57: rotary frequencies of base 10,000, where the file says 1,000,000 under `rope_parameters` alone). Others
ask the class, whose defaults come back for keys that are left out (llama.cpp's converter: 64 experts in a dense DeepSeek-V2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Keys that count experts, and those of them that a token goes through.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_FLOAT = "__float__"
_SCALED = ("linear", "dynamic", "yarn", "llama3")  # rotary embeddings that have a factor
# What a config says of where it came from and how it is stored.
_OF_FILES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config")


def differences(meant: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """Keys of a config, as `to_dict` gives it, that another reader of its file takes for something else."""
    found = []
    for name, value in meant.items():
        if name == "text_config":
            found += [f"text_config.{inner}" for inner in differences(value, read.get(name) or {})]
        elif name not in _OF_FILES and read.get(name) != value:
            found.append(f"{name}: {value} is read as {read.get(name)}")
    return found


def as_json(value: Any) -> Any:
    """Infinite numbers as transformers saves them: a bare `Infinity` is no JSON, and only Python reads the file then."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def of_json(value: Any) -> Any:
    """The inverse of `as_json`."""
    if isinstance(value, Mapping):
        if set(value) == {_FLOAT}:
            return float(value[_FLOAT])
        return {name: of_json(item) for name, item in value.items()}
    return [of_json(item) for item in value] if isinstance(value, list) else value


def for_all_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json with `rope_theta`, `rope_scaling` and `torch_dtype` beside the keys that took their places in
    transformers 5, whose classes read both alike. Where kinds of layers have rotary embeddings of their own, each class had other names for
    them: these stay. Where `mlp_layer_types` says that all layers are dense, so does the `first_k_dense_replace` of published files, which
    vLLM and llama.cpp read (GLM-4.7-Flash: they would look for experts).
    """
    written = {name: for_all_readers(value) if name == "text_config" else value for name, value in config.items()}
    if set(written.get("mlp_layer_types") or ()) == {"dense"}:
        written["first_k_dense_replace"] = len(written["mlp_layer_types"])
    if isinstance(written.get("dtype"), str):
        written["torch_dtype"] = written["dtype"]
    rope = written.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return written
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    written["rope_theta"] = rope["rope_theta"]
    written["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "partial_rotary_factor" in rope:
        written["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return written


def left_to_defaults(config: Mapping[str, Any], read: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """Keys that the class built from a config.json has and that the file does not say. usual: what every class has."""
    return [name for name in read if name not in config and name not in usual and name not in _OF_FILES]


def contradictions(config: Mapping[str, Any]) -> list[str]:
    """What a class believes of experts, heads and rotary positions that no model can have: keys that were left out came back as defaults.
    Stock classes compute all the same where no layer asks, other readers stop."""
    inner = config.get("text_config") or config
    experts = next((inner[name] for name in EXPERTS if inner.get(name)), 0)
    active = next((inner[name] for name in ACTIVE if inner.get(name) is not None), None)
    groups, of_groups = inner.get("n_group") or inner.get("num_expert_group") or 1, inner.get("topk_group") or 1
    heads, kv_heads = inner.get("num_attention_heads"), inner.get("num_key_value_heads")
    found = []
    if experts and not (isinstance(active, int) and 1 <= active <= experts):
        found.append(f"{experts} experts, of which {active} are active")
    if experts and (experts % groups or of_groups > groups):
        found.append(f"{experts} experts in {groups} groups, of which {of_groups} are chosen")
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads < 1 or heads % kv_heads):
        found.append(f"{heads} query heads for {kv_heads} key and value heads")
    rope = inner.get("rope_parameters") or {}
    for kind in [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, Mapping)]:
        if not kind.get("rope_theta") or (kind.get("rope_type") in _SCALED and not kind.get("factor")):
            found.append(f"rotary positions {dict(kind)}")
    return found
