"""`moe2dense prune-dense`: a dense checkpoint to a smaller one of the same family, one layer in memory at a time
(docs/method.md#the-dense-to-dense-baseline)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_moe2dense.compute.ranks import Ranks, joined
from megatron_moe2dense.families.widths import said_of
from megatron_moe2dense.surgery.calibrate import Job, chosen_compute, compute_facts, data_facts
from megatron_moe2dense.surgery.inspect import left_out_line
from megatron_moe2dense.surgery.prune_dense.config import PruneDenseConfig
from megatron_moe2dense.surgery.prune_dense.importance import choose, measure
from megatron_moe2dense.surgery.prune_dense.shape import target_shape
from megatron_moe2dense.surgery.prune_dense.source import DenseSource, Shape
from megatron_moe2dense.surgery.prune_dense.write import steps_of, write_pruned
from megatron_moe2dense.surgery.resume import Resume
from megatron_moe2dense.tokens.indexed import windows


def run(config: PruneDenseConfig) -> None:
    """Measure importance in one pass over the calibration text, and write the smaller checkpoint. Under torchrun every process takes a
    share of the windows, and the first one writes.

    Raises:
        UserError: the source can not be pruned, the target does not fit it, the tokens do not fit it, the output exists.
    """
    with joined() as ranks:
        source = DenseSource.open(config.source)
        shape = target_shape(source, config.target)
        windows_BS = windows(config.data, source.dims)
        compute = chosen_compute(config, ranks)
        share_BS = ranks.share(windows_BS, compute.batch)
        facts = {"source": source.facts(), "data": data_facts(windows_BS), "compute": compute_facts(compute, ranks)}
        identity = [{**facts, "source": source.fingerprint}, hashlib.sha256(windows_BS.tobytes()).hexdigest()]
        output, chosen = Path(config.output), dataclasses.asdict(shape)
        with ranks.output_directory(output, "prune-dense", config.model_dump(mode="json"), **facts, shape=chosen) as working:
            resume = Resume(working, identity, ranks, config.memory_budget)
            stats = measure(source, share_BS, compute, Job(ranks, resume))
            if ranks.rank == 0:
                write_pruned(source, choose(source, stats, shape), shape, working, config.shard_size)
            resume.remove()
        if ranks.rank == 0:
            sizes = ", ".join(f"{name} {value}" for name, value in chosen.items())
            before, after = source.parameters(source.shape), source.parameters(shape)
            print(f"{output}: {after:,} of {before:,} parameters, {_nbytes(source, shape) / 1e6:,.1f} MB\n{sizes}")
            if said := said_of(shape.intermediate_size):
                print(said)
            if source.account.left_out:
                print(left_out_line(source.account.left_out_facts(), source.spec.name))


def dry_run(config: PruneDenseConfig) -> dict[str, Any]:
    """The shape, what would be read and written (bytes), the FLOPs and the memory (bytes)."""
    source = DenseSource.open(config.source)
    shape, dims = target_shape(source, config.target), source.dims
    windows_BS = windows(config.data, dims)
    ranks = Ranks(0, int(os.environ.get("WORLD_SIZE", "1")))
    compute = chosen_compute(config, ranks)
    element = compute.dtype.itemsize
    layer = source.parameters(dataclasses.replace(source.shape, num_hidden_layers=1)) - source.parameters(
        dataclasses.replace(source.shape, num_hidden_layers=0)
    )
    attention = dims.heads * dims.head_dim * (windows_BS.shape[1] + 1)  # scores and values, half the keys on average
    tokens = min(windows_BS.size, compute.batch * windows_BS.shape[1])
    hidden = ranks.share(windows_BS, compute.batch).size * dims.hidden_size * element
    return {
        "source": source.facts(),
        "left_out": source.account.left_out_facts(),
        "shape": dataclasses.asdict(shape),
        "width": said_of(shape.intermediate_size) or "taken by all kernels and formats as it is",
        "parameters": {"source": source.parameters(source.shape), "output": source.parameters(shape)},
        "data": data_facts(windows_BS),
        "compute": compute_facts(compute, ranks),
        "reads": {str(source.index.directory): source.index.nbytes, config.data.path: windows_BS.size * 2},
        "writes": {config.output: _nbytes(source, shape)},
        "flops": 2 * dims.layers * (layer + attention) * windows_BS.size,
        "memory_bytes": {
            "weights of one layer, and of the next on their way": 2 * layer * element,
            "the embedding, before the first layer": dims.vocab_size * dims.hidden_size * element,
            f"hidden states of one process ({'disk' if hidden > config.memory_budget else 'memory'})": hidden,
            "activations of an FFN": 3 * tokens * dims.dense_width * element,
        },
    }


def _nbytes(source: DenseSource, shape: Shape) -> int:
    return sum(spec.nbytes for step in steps_of(source, shape) for _, spec in step)
