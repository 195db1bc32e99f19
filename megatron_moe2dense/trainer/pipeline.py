"""Pipeline parallelism: which layers stand on which (virtual) stage, and Megatron-Core's schedules over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.config import ParallelConfig


@dataclass(frozen=True)
class PipelineLayout:
    """Decoder layers of every stage in order of depth; with several chunks a rank, stage i stands on pipeline rank i % stages.

    Attributes:
        layers: how many, pipeline x chunks entries. chunks: virtual stages (model chunks) on each pipeline rank.
    """

    layers: tuple[int, ...]
    chunks: int

    @classmethod
    def of_student(cls, parallel: ParallelConfig, layers: int) -> PipelineLayout:
        """By `parallel.layers_per_stage`, or even; UserError when the layers do not divide or do not add up."""
        return cls._of("parallel.layers_per_stage", layers, parallel.layers_per_stage, (parallel.pipeline, parallel.virtual_pipeline))

    @classmethod
    def of_teacher(cls, parallel: ParallelConfig, layers: int) -> PipelineLayout:
        """By `parallel.teacher_layers_per_stage`, or even; never interleaved: its pass is forward only, with a bubble of its own."""
        return cls._of("parallel.teacher_layers_per_stage", layers, parallel.teacher_layers_per_stage, (parallel.pipeline, 1))

    @classmethod
    def _of(cls, key: str, layers: int, given: list[int] | None, shape: tuple[int, int]) -> PipelineLayout:
        stages = shape[0] * shape[1]
        if given is None:
            if layers % stages:
                raise UserError(
                    f"parallel: {stages} pipeline stages with num_hidden_layers = {layers}",
                    f"a divisor of {layers}",
                    f"choose other stages, or say how many layers each has with {key}",
                )
            return cls((layers // stages,) * stages, shape[1])
        if len(given) != stages or sum(given) != layers:
            raise UserError(f"{key}: {given}", f"{stages} numbers that add up to {layers} layers", f"change {key}")
        return cls(tuple(given), shape[1])

    def megatron_layout(self) -> list[list[str]]:
        """As Megatron-Core's `pipeline_model_parallel_layout`."""
        stages = [["decoder"] * count for count in self.layers]
        return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def run_schedule(forward: Callable[..., Any], chunks: Sequence[torch.nn.Module], batches: Sequence[Any], **options: Any) -> list[Any]:
    """Megatron's schedule for these model chunks: none, 1F1B, or interleaved.

    Args:
        forward: Megatron's forward_step_func; its iterator gives the items of `batches` in order, to every chunk.
        chunks: of one model. options: of Megatron's schedules.
        batches: items whose first member is a `Batch`, of this rank's part of the sequences.

    Returns:
        What the loss function reported, one entry a micro-batch, on the last stage; an empty list elsewhere.
    """
    config: Any = chunks[0].config
    run = get_forward_backward_func(config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size)
    batch_size, length = batches[0][0].tokens.shape
    iterators: list[Iterator[Any]] = [iter(batches) for _ in chunks]
    return run(
        forward_step_func=forward,
        data_iterator=iterators,
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=length * config.context_parallel_size,
        micro_batch_size=batch_size,
        **{"forward_only": False, **options},
    )
