"""Config blocks of prune-dense. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source
from megatron_moe2dense.common.sizes import Bytes
from megatron_moe2dense.tokens.config import TokensConfig

MULTIPLE = 64


class PruneTarget(Config):
    """A shape, of which what is not given stays as it is, or a number of parameters."""

    hidden_size: int | None = key(None, "channels of the residual stream; null: the source's", "channels", gt=0)
    num_hidden_layers: int | None = key(None, "decoder layers; null: the source's", "layers", gt=0)
    num_attention_heads: int | None = key(None, "query heads; null: the source's", "heads", gt=0)
    num_key_value_heads: int | None = key(None, "key and value heads; null: the source's", "heads", gt=0)
    intermediate_size: int | None = key(None, "neurons of the FFN; null: the source's", "neurons", gt=0)
    parameters: int | None = key(None, "in place of a shape: the largest with about the source's ratios and at most so many", gt=0)
    multiple: int | None = key(
        None, f"hidden_size and intermediate_size that `parameters` may choose are multiples of it; null: {MULTIPLE}", gt=0
    )

    @model_validator(mode="after")
    def _shape_or_budget(self) -> PruneTarget:
        given = [name for name, value in self.sizes().items() if value is not None]
        if bool(given) == (self.parameters is not None):
            found = f"parameters and {', '.join(given)} are both given" if given else "no size and no number of parameters is given"
            raise ValueError(f"{found}: give a shape or parameters, one of the two")
        if self.multiple is not None and self.parameters is None:
            raise ValueError("multiple has no effect on a given shape; remove it")
        return self

    def sizes(self) -> dict[str, int | None]:
        """The shape, None where it is the source's."""
        return self.model_dump(exclude={"parameters", "multiple"})


class PruneDenseConfig(Config):
    """`moe2dense prune-dense`."""

    source: Annotated[str, Source()] = key(..., "Hugging Face checkpoint directory of a dense model")
    output: str = key(..., "directory to write the smaller checkpoint and kept.json to")
    target: PruneTarget = key(..., "the shape to prune to, or a number of parameters")
    data: TokensConfig = key(..., "the calibration text")
    batch_tokens: int = key(8192, "tokens of one forward pass, rounded down to whole windows, at least one", "tokens", gt=0)
    device: str = key("auto", "torch device; auto: cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = key("auto", "compute type; auto: float32 on cpu, bfloat16 on cuda")
    shard_size: Bytes = key("4GiB", "largest .safetensors file of the output", "bytes", gt=0)
    memory_budget: Bytes = key("8GiB", "hidden states of a process beyond this live in a file beside the output", "bytes", gt=0)
    overwrite: bool = key(False, "replace an existing output")
