"""Are the weights in the model those of the files? An exact sum per tensor, the same in every parallel layout.

The sum is that of the bits of all values as integers, modulo 2^64, in the model's dtype: nothing is rounded, so order and layout do not
matter and a single other bit does. The files are read a second time for it, past the loader, each rank its share of the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec
from megatron_moe2dense.trainer.verification.bits import bit_sum
from megatron_moe2dense.trainer.weights import files_of, weights_of_rank

_READ = 1024**2  # bytes


@dataclass(frozen=True)
class Fingerprint:
    """What a verified model holds.

    Attributes:
        digest: hash over name, shape and sum of every tensor. zeros: names of the matrices that hold nothing but zeros.
    """

    digest: str
    zeros: tuple[str, ...]


def verify(chunks: Sequence[HeadlessGPT], spec: ModelSpec, groups: Groups) -> Fingerprint:
    """Compare what stands in the model's parameters with the files it was opened from; a collective of all ranks.

    It can not see a tensor at the place of another of its own parameter (q for k): that takes a forward pass. Of a weight that was
    rounded to FP8 when it was loaded it judges what was rounded.

    Raises:
        UserError: a parameter holds other values than its tensors in the files; a tensor of the files is in no parameter.
    """
    directory = spec.opened.index.directory
    index = CheckpointIndex.open(directory)
    names = sorted(index.tensors)
    device = next(chunks[0].parameters()).device
    in_model_N, parameter_N, bytes_N = _of_model(chunks, (spec, groups), {name: i for i, name in enumerate(names)}, device)
    may_be_left = _may_be_left(spec)
    left_over = [name for name, number in zip(names, parameter_N, strict=True) if number < 0 and name not in may_be_left]
    if left_over:
        raise UserError(
            f"{directory}: {len(left_over)} tensors that no parameter of the model takes, first {left_over[0]}",
            f"the tensors of {type(spec.stock.model).__name__}",
            "check that config.json and the weights are of the same model",
        )
    # in bfloat16 models a few parameters are float32 all the same
    dtypes = {name: torch.float32 if nbytes == 4 else spec.dtype for name, nbytes in zip(names, bytes_N, strict=True)}
    values = Values(index)
    in_files_N = _of_files(values, dtypes, device)
    expected_N = [0] * len(names)
    for value, number in zip(in_files_N, parameter_N, strict=True):
        if number >= 0:
            expected_N[number] = _wrapped(expected_N[number] + value)
    wrong = [name for name, found, expected in zip(names, in_model_N, expected_N, strict=True) if found != expected]
    if wrong:
        raise UserError(
            f"{directory}: {len(wrong)} parameters of the model are not what the files hold, first that of {wrong[0]}",
            "the weights of the files in the model",
            "nothing was trained; a family's weight mapping may be wrong (docs/adding.md), or the files change while they are read",
        )
    matrices = {name for name in names if (held := values.held(name)) is not None and len(values.shapes[held]) > 1}
    zeros = tuple(name for name, value in zip(names, in_files_N, strict=True) if value == 0 and name in matrices)
    content = [(name, index.tensors[name].shape, value) for name, value in zip(names, in_files_N, strict=True)]
    return Fingerprint(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32], zeros)


def _of_model(
    chunks: Sequence[HeadlessGPT], place: tuple[ModelSpec, Groups], number_of: dict[str, int], device: torch.device
) -> tuple[list[int], list[int], list[int]]:
    """By number of a tensor: sum of the parameter whose first tensor it is; number of its parameter's first tensor, -1 for none; bytes of
    a value in the parameter."""
    sums_N = torch.zeros(len(number_of), dtype=torch.int64, device=device)
    first_N, bytes_N = torch.full_like(sums_N, -1), torch.zeros_like(sums_N)
    for weight in weights_of_rank(chunks, *place):
        first, *more = (number_of[name] for name in files_of(place[0].opened, weight.entry))
        first_N[[first, *more]], bytes_N[[first, *more]] = first, weight.tensor.element_size()
        if weight.counts:
            sums_N[first] += bit_sum(weight.tensor) if weight.bits is None else weight.bits
    dist.all_reduce(sums_N)
    dist.all_reduce(first_N, op=dist.ReduceOp.MAX)
    dist.all_reduce(bytes_N, op=dist.ReduceOp.MAX)
    return sums_N.tolist(), first_N.tolist(), bytes_N.tolist()


def _of_files(values: Values, dtypes: Mapping[str, torch.dtype], device: torch.device) -> list[int]:
    """Sum of every tensor after conversion to its dtype; each rank reads tensors of its share of the bytes."""
    index = values.index
    sums_N = torch.zeros(len(dtypes), dtype=torch.int64, device=device)
    rank, share, passed = dist.get_rank(), index.nbytes / dist.get_world_size(), 0
    with CheckpointReader(index) as reader:
        for number, (name, dtype) in enumerate(dtypes.items()):
            info = index.tensors[name]
            mine = int((passed + info.nbytes / 2) / share) == rank
            passed += info.nbytes
            held = values.held(name)
            if not mine or held is None:
                continue
            sums_N[number] += (_of_encoded if held in values.encoded else _of_file)(values, reader, held, dtype)
    dist.all_reduce(sums_N)
    return sums_N.tolist()


def _of_file(values: Values, reader: CheckpointReader, name: str, dtype: torch.dtype) -> int:
    """Sum of one tensor."""
    stored, read = TORCH_DTYPES[reader.index.tensors[name].dtype], values.dtype(name)
    return _wrapped(sum(bit_sum(torch.from_numpy(raw).view(stored).to(read).to(dtype)) for _, raw in reader.chunks(name, _READ)))


def _of_encoded(values: Values, reader: CheckpointReader, name: str, dtype: torch.dtype) -> int:
    """Sum of decoded values, of one expert at a time; they count where their codes are."""
    read, shape = values.reader(reader, finite=False), values.shapes[name]
    parts = [slice(expert, expert + 1) for expert in range(shape[0])] if len(shape) > 2 else [None]
    return _wrapped(sum(bit_sum(read(name, part).to(dtype)) for part in parts))


def _wrapped(value: int) -> int:
    """A Python integer as int64 arithmetic would have it."""
    return (value + 2**63) % 2**64 - 2**63


def _may_be_left(spec: ModelSpec) -> set[str]:
    """What the stock class leaves out too, the head of a tied model saved a second time, routers with one expert."""
    account = spec.opened
    copies = (*spec.idle_router(), *spec.stock.model.all_tied_weights_keys)
    return {*account.left_out, *(stored for name in copies for stored in account.disk.names_of(name))}
