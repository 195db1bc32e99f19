"""The student's first weights: those of its checkpoint, random ones, or its checkpoint's with random FFNs."""

from __future__ import annotations

from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megatron_moe2dense.trainer import optim, parts, random_weights, weights
from megatron_moe2dense.trainer.checkpoints.writer import latest
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec
from megatron_moe2dense.trainer.verification import fingerprint


def start(config: DistillConfig, chunks: list[HeadlessGPT], spec: ModelSpec, groups: Groups) -> list[DistributedDataParallel]:
    """Fill the chunks as `config.initialize` says and wrap them for data parallelism, the same on all data-parallel ranks.

    A run without a checkpoint of its own compares the loaded weights with the files first; random ones are drawn after that.

    Raises:
        UserError: the student's files do not give its weights.
    """
    drawn = config.initialize == "random"
    if drawn:
        random_weights.draw(chunks, spec, groups, config.train.seed)
    else:
        weights.load(chunks, spec, groups)
    parts.freeze(chunks, config.train.parts, spec, groups)
    wrapped = optim.wrap(chunks, config, groups)
    for chunk in wrapped:
        chunk.broadcast_params()
    if not drawn and latest(Path(config.output) / "checkpoints") is None:
        fingerprint.verify(chunks, spec, groups)
    if config.initialize == "random_ffn":
        random_weights.draw(chunks, spec, groups, config.train.seed, ffns_alone=True)
    return wrapped
