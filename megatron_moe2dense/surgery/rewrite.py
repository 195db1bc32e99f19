"""One pass over a MoE checkpoint that writes one or several dense ones, layer after layer: experts pass by in chunks to be checked,
dense layers go straight to their place in the output. A killed pass goes on at the first layer that is not on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_moe2dense.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from megatron_moe2dense.checkpoint.shards import SHARD_BYTES, ShardWriter, shards_of
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.families.written import finish
from megatron_moe2dense.surgery.layout import (
    Step,
    dense_config,
    dense_of,
    dense_steps,
    layer_ffn,
    making_bytes,
    replaced,
    stored_added,
    stored_ffn,
)
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.proof import prove
from megatron_moe2dense.surgery.refit.store import FittedLayers
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.written import Written

PLAN_FILE, REFIT_FILE = "plan.json", "refit.json"
_CHECKERS = min(8, 2 * (os.cpu_count() or 1))  # threads: half of them wait for the disk
_CHUNK = 4 * 1024**2  # bytes of one piece of a copied tensor


@dataclass
class DenseOutput:
    """One dense checkpoint in the making. directory: its working directory. shard_bytes: of its largest file. fits: refitted layers."""

    plan: ConversionPlan
    directory: Path
    shard_bytes: int = SHARD_BYTES
    fits: FittedLayers | None = None
    steps: list[Step] = field(default_factory=list)

    def find(self, source: MoeSource) -> None:
        """What goes where, and how far an earlier run came."""
        self.steps = dense_steps(source, self.plan.groups)
        self.shards = shards_of([spec for step in self.steps for spec in step.specs], self.shard_bytes)
        self.written = Written.find(self.directory, [source.fingerprint, self.plan.hash()], self.shards, len(self.steps))

    def lay_out(self, queue_bytes: int) -> ShardWriter:
        """The files, in their full size."""
        return ShardWriter(self.directory, self.shards, queue_bytes)

    @property
    def done(self) -> int:
        """Steps on disk."""
        return self.written.done


def write_dense(source: MoeSource, reader: CheckpointReader, outputs: Sequence[DenseOutput], memory_budget: int) -> None:
    """Fill the working directory of every output: weights, config.json, plan.json, tokenizer files.

    Args:
        reader: open on the source. memory_budget: bytes that dense layers in the making and waiting writes may take together.

    Raises:
        UserError: the dense class does not compute what the first MoE layer does; a NaN or infinite weight; a full disk; a budget too
            small for one layer; the stock class does not open what was written, which is gone then.
    """
    queue_bytes = _queue_bytes(source, outputs, memory_budget)
    for output in outputs:
        output.find(source)
    first, last = min(output.done for output in outputs), 1 + source.dims.layers
    if not first:
        prove(source, reader, outputs[0].plan.groups, memory_budget)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_CHECKERS, thread_name_prefix="check"))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        writers = [stack.enter_context(output.lay_out(queue_bytes)) for output in outputs]
        checks = {first: _check(source, reader, pool, first - 1)} if first < last else {}
        for number in progress(range(first, last), "write", "part", last, done=first, each=True):
            for future in checks.pop(number):
                future.result()
            checks[number + 1] = _check(source, reader, pool, number)
            for output, writer in zip(outputs, writers, strict=True):
                if output.done <= number:
                    _write_step(source, reader, output, writer, number)
        for output, writer in zip(outputs, writers, strict=True):
            writer.finish()
            _write_rest(source, output)


def _queue_bytes(source: MoeSource, outputs: Sequence[DenseOutput], memory_budget: int) -> int:
    """What one output's queue may hold, so that all of them and one layer in the making stay within the budget."""
    making = max(making_bytes(source, output.plan) for output in outputs)
    needed = making + len(outputs) * 2 * _CHUNK
    if memory_budget < needed:
        raise UserError(
            f"memory_budget={memory_budget} bytes",
            f"at least {needed}: one dense layer in the making, and a piece to write for each of {len(outputs)} outputs",
            "raise memory_budget, or convert fewer plans at once",
        )
    return (memory_budget - making) // len(outputs)


def _check(source: MoeSource, reader: CheckpointReader, pool: ThreadPoolExecutor, layer: int) -> list[Future[None]]:
    """Look at every weight that is not just copied, also of experts that are not kept: their MoE is the teacher of the next stage."""
    names = replaced(source, layer) if layer in range(source.dims.layers) else ()
    return [pool.submit(source.values.check, reader, name) for name in names]


def _write_step(source: MoeSource, reader: CheckpointReader, output: DenseOutput, writer: ShardWriter, number: int) -> None:
    step, plans = output.steps[number], {layer.layer: layer for layer in output.plan.layers}
    for name, spec in step.copied.items():
        if not source.values.is_stored(name):
            writer.write(spec.name, source.reader(reader)(name, None).contiguous())
            continue
        for offset, data in reader.chunks(name, _CHUNK, finite=True):
            writer.write_bytes(spec.name, offset, data)
    dense = dense_of(source, output.plan.groups)
    if step.layer is not None and step.layer in dense.slots:
        fit = output.fits[step.layer] if output.fits is not None and step.layer in plans else None
        ffn = layer_ffn(source, source.reader(reader, finite=False), step.layer, plans.get(step.layer), fit)
        for name, tensor in stored_ffn(dense, step.layer, ffn).items():
            writer.write(name, tensor)
    elif step.layer is not None and step.made:
        like = torch.empty(0, dtype=TORCH_DTYPES[step.made[0].dtype])
        for name, tensor in stored_added(dense, step.layer, like).items():
            writer.write(name, tensor)
    writer.mark(output.written.reached(number + 1))


def _write_rest(source: MoeSource, output: DenseOutput) -> None:
    output.plan.write(output.directory / PLAN_FILE)
    if output.fits is not None:
        facts = [output.fits[plan.layer].report.facts() for plan in output.plan.layers]
        write_json(output.directory / REFIT_FILE, {"layers": facts})
        output.fits.remove()
    config = dense_config(source, output.plan.groups)
    finish(output.directory, config, source.index.directory, processors=source.stock.wrapped and not source.form.alone)
    output.written.remove()
