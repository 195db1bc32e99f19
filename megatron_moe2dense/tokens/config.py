"""Config blocks of the token files."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source


class TokensConfig(Config):
    """Windows of a token stream, for calibration and evaluation: consecutive, not overlapping, each its own sequence."""

    path: str = key(..., "prefix of the .bin/.idx files")
    sequence_length: int = key(2048, "length of one window", "tokens", gt=1)
    sequences: int | None = key(512, "how many windows, drawn by `seed` when there are more; null: all", "windows", gt=0)
    seed: int = key(0, "seed of the draw")
    pad_token: int | None = key(None, "id of a padding token in the files, left out before windows are cut; null: none", ge=0)

    @model_serializer(mode="wrap")
    def _as_before_there_was_padding(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the key where it says nothing: plans and unfinished runs of earlier versions are the same."""
        return {name: value for name, value in handler(self).items() if (name, value) != ("pad_token", None)}


class DataConfig(Config):
    """`moe2dense data`."""

    source: str | list[str] = key(
        ..., "txt (a document a file), jsonl (.gz, .zst too), json or parquet (a document a row) files, or folders of them"
    )
    tokenizer: Annotated[str, Source("small")] = key(..., "HF directory, tokenizer.json or sentencepiece .model")
    output: str = key(..., "prefix of the files to write")
    text_key: str | dict[str, str] = key("text", "field of rows that holds the text; or {source: field, ...}, the others have text")
    append_eod: bool = key(True, "end every document with the end-of-document token")
    eod_token: str | None = key(None, "end-of-document token; null: the tokenizer's end-of-sequence token")
    workers: int = key(1, "processes that tokenise", gt=0)
    validation_fraction: float = key(
        0.0,
        "share of documents that goes to <output>_validation, by a hash of the text: equal ones stay together",
        "fraction",
        ge=0,
        lt=1,
    )
    seed: int = key(0, "seed of the choice of validation documents")
    overwrite: bool = key(False, "replace existing output")

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> DataConfig:
        if self.eod_token is not None and not self.append_eod:
            raise ValueError("eod_token has no effect with append_eod=false; remove one of the two")
        if self.seed and not self.validation_fraction:
            raise ValueError("seed has no effect with validation_fraction=0; remove it, or set validation_fraction")
        return self
