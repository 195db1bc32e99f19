"""The student's first weights: those of its checkpoint, random ones, or its checkpoint's with random FFNs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_moe2dense.trainer import optim, weights
from megatron_moe2dense.trainer.checkpoints.writer import latest
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec
from megatron_moe2dense.trainer.verification import fingerprint


def start(config: DistillConfig, chunks: list[HeadlessGPT], spec: ModelSpec, groups: Groups) -> list[DistributedDataParallel]:
    """Fill the chunks as `config.initialize` says and wrap them for data parallelism, the same on all data-parallel ranks.

    A run without a checkpoint of its own compares the loaded weights with the files first. Random FFNs are those that the model was
    built with, as all of it is with `initialize: random`; the rest is loaded and compared like any checkpoint.

    Raises:
        UserError: the student's files do not give its weights.
    """
    drawn = [(weight, weight.detach().clone()) for weight in ffn_weights(chunks)] if config.initialize == "random_ffn" else []
    if config.initialize != "random":
        weights.load(chunks, spec, groups)
    wrapped = optim.wrap(chunks, config, groups)
    _broadcast(wrapped)
    if config.initialize != "random" and latest(Path(config.output) / "checkpoints") is None:
        fingerprint.verify(chunks, spec, groups)
    if drawn:
        _put_back(drawn)
        _broadcast(wrapped)
    return wrapped


def ffn_weights(chunks: Sequence[HeadlessGPT]) -> list[Tensor]:
    """Every parameter of the FFN blocks. Transformer Engine keeps the norm before a block inside it; that is no part of the FFN."""
    named = [item for chunk in chunks for item in chunk.named_parameters()]
    return [parameter for name, parameter in named if ".mlp." in name and "layer_norm" not in name]


@torch.no_grad()
def _put_back(drawn: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in drawn:
        parameter.copy_(value)


def _broadcast(wrapped: Sequence[DistributedDataParallel]) -> None:
    for chunk in wrapped:
        chunk.broadcast_params()
