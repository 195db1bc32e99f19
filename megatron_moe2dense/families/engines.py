"""What serving engines can not do with a dense result, as far as its config tells: an entry a fact, with the version it was seen in.

What only running the engine tells is not here, nor what its tokenizer takes (written.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_GPT_OSS_LIMIT, _GPT_OSS_ALPHA = 7.0, 1.702
_LITE_LAYERS, _LITE_VOCABULARY = (26, 27), (48, 128256)


@dataclass(frozen=True)
class EngineFact:
    """engine: with the version that was looked at. types: model types that it is about, "" for all. differs: whether a config (as the class
    believes it, of the language model) meets it. said: what happens, with keys of the config in braces. do: what helps."""

    engine: str
    types: tuple[str, ...]
    differs: Callable[[Mapping[str, Any]], bool]
    said: str
    do: str

    def of(self, config: Mapping[str, Any]) -> str:
        """For people; nothing where it is not met."""
        if self.types and config.get("model_type") not in self.types:
            return ""
        return f"{self.engine}: {self.said.format_map(config)}; {self.do}" if self.differs(config) else ""


def _other_clamp(config: Mapping[str, Any]) -> bool:
    return (config.get("swiglu_limit"), config.get("swiglu_alpha", _GPT_OSS_ALPHA)) != (_GPT_OSS_LIMIT, _GPT_OSS_ALPHA)


def _other_depth(config: Mapping[str, Any]) -> bool:
    layers = config.get("num_hidden_layers")
    lite = layers in _LITE_LAYERS or (layers, config.get("vocab_size")) == _LITE_VOCABULARY
    return lite != (config.get("q_lora_rank") is None)


def _plain_positions_of_latent_attention(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or {}
    return bool(config.get("kv_lora_rank")) and bool(config.get("qk_rope_head_dim")) and rope.get("rope_type") == "default"


def _yarn_is_not_rounded(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or {}
    return rope.get("rope_type") == "yarn" and rope.get("truncate") is False


FACTS = (
    EngineFact(
        "vLLM 0.32 and llama.cpp b11739",
        ("gpt_oss",),
        _other_clamp,
        "they clamp GPT-OSS at swiglu_limit 7.0 with swiglu_alpha 1.702, whatever config.json says ({swiglu_limit} and {swiglu_alpha}): "
        "other tokens, without a word",
        "serve it with transformers serve",
    ),
    EngineFact(
        "llama.cpp b11739",
        ("deepseek_v2", "deepseek_v3"),
        _other_depth,
        "it takes 26 or 27 layers (48 with a vocabulary of 128256) for a DeepSeek without a low rank of queries, and any other depth "
        "for one with it: {num_hidden_layers} layers and q_lora_rank {q_lora_rank} do not load",
        "serve it with vLLM or transformers, or keep the depth of the published model",
    ),
    EngineFact(
        "llama.cpp b11549",
        (),
        _yarn_is_not_rounded,
        "it rounds the border dimensions of YaRN, which truncate: false in rope_parameters forbids (as GPT-OSS has it): other rotary "
        "frequencies, without a word",
        "serve it with vLLM or transformers, or measure by how much it is off: moe2dense serve-check",
    ),
    EngineFact(
        "vLLM 0.32 on a CPU",
        (),
        _plain_positions_of_latent_attention,
        "its rotary positions of latent attention are wrong for rope_type default (YaRN's are right)",
        "serve it on a GPU, or with llama.cpp or transformers",
    ),
)


def said_of_engines(config: Mapping[str, Any]) -> list[str]:
    """Of a config as its class believes it (`to_dict`), alone or around a language model: what engines will not do, by name."""
    inner = config.get("text_config") or config
    return [said for fact in FACTS if (said := fact.of(inner))]
