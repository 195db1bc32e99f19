"""Config blocks of training text: token files of `moe2dense data`, cut into samples by Megatron-Core's GPTDataset."""

from __future__ import annotations

from pydantic import model_validator

from megatron_moe2dense.common.config import Config, key


class SourceConfig(Config):
    """One token file of a mixture."""

    path: str = key(..., "prefix of its .bin/.idx")
    weight: float = key(..., "its share of the samples, relative to the other weights", gt=0)


class StreamConfig(Config):
    """The samples that training reads, in an order that seed and sample number alone decide."""

    path: str | None = key(None, "prefix of the training .bin/.idx; give this or blend")
    blend: list[SourceConfig] | None = key(None, "mixture: [{path, weight}, ...], Megatron-Core's BlendedDataset", min_length=2)
    sequence_length: int = key(2048, "length of one sample", "tokens", gt=1)
    epochs: int = key(1, "how often all of the text (of each source) may be read, pass after pass; distillation wants 1", "passes", gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> StreamConfig:
        if (self.path is None) == (self.blend is None):
            raise ValueError("give exactly one of path and blend")
        paths = [source.path for source in self.sources()]
        if len(set(paths)) < len(paths):
            raise ValueError("a path stands twice in blend: add the weights up")
        return self

    def files(self) -> dict[str, str]:
        """Prefixes of the token files by the keys that name them."""
        if self.blend is not None:
            return {f"data.blend[{number}].path": source.path for number, source in enumerate(self.blend)}
        assert self.path is not None
        return {"data.path": self.path}

    def sources(self) -> list[SourceConfig]:
        """The token files with their weights; one of weight 1 for `path`."""
        if self.blend is not None:
            return self.blend
        assert self.path is not None
        return [SourceConfig(path=self.path, weight=1.0)]


class TrainDataConfig(StreamConfig):
    """Text for training and for evaluation on the way, and which predictions count."""

    validation: str | None = key(None, "prefix of the held-out .bin/.idx, read every train.eval_every steps")
    validation_sequences: int = key(64, "held-out sequences read at each evaluation, the same for every train.seed", "sequences", gt=0)
    mask_end_of_document: bool = key(False, "leave out the prediction made at an end-of-document token (the next document's first token)")
    end_of_document: int | None = key(None, "that token's id; null: eos_token_id of the student's config.json")
    pad_token: int | None = key(None, "id of a padding token inside the token files: predictions of it and at it are left out; null: none")

    @model_validator(mode="after")
    def _masks_have_effect(self) -> TrainDataConfig:
        if self.end_of_document is not None and not self.mask_end_of_document:
            raise ValueError("end_of_document has no effect without mask_end_of_document")
        if self.pad_token is not None and self.pad_token == self.end_of_document:
            raise ValueError("pad_token is the end-of-document token, whose prediction would never be trained")
        return self
