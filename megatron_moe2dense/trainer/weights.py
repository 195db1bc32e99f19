"""Hugging Face weights into this rank's part of a Megatron model, slice by slice, and back out of a whole one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.values import DECODED, cut
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import WeightRule
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.disk import ReadTensor, plain_names, revert
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import Entry, WeightMapping, join, split, splits_heads
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec, padded_vocabulary
from megatron_moe2dense.trainer.runtime import stored_fp8
from megatron_moe2dense.trainer.verification.bits import bit_sum


@dataclass(frozen=True)
class Rounding:
    """What was rounded to FP8: matrices, and the sums of squares of the errors and of the weights."""

    matrices: int = 0
    errors: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.matrices + other.matrices, self.errors + other.errors, self.weights + other.weights)

    @property
    def relative(self) -> float:
        """Norm of the errors over that of the weights."""
        return math.sqrt(self.errors / self.weights) if self.weights else 0.0


@torch.no_grad()
def load(chunks: Sequence[HeadlessGPT], spec: ModelSpec, groups: Groups) -> Rounding:
    """Fill every parameter of the model's chunks from the opened checkpoint; each rank reads its slices, and whole what is stored in
    another form than the class holds it (packed or stacked experts: one at a time). Of a model that is `in_fp8` matrices get memory one by
    one: codes and scales of the files where they are E4M3, else rounded ones, of which the answer tells.

    Raises:
        UserError: a tensor of another shape than the model's, NaN or infinite.
    """
    account, total = spec.opened, Rounding()
    keeps_codes = any(encoded.scales is not None for encoded in account.values.encoded.values())
    with CheckpointReader(account.index) as reader:
        numbers = _Source(account.values.reader(reader, finite=False), partial(account.values.part, reader))
        for chunk, name, parameter, entry in list(named_of_rank(chunks, spec, groups)):
            where = f"{account.index.directory}: {', '.join(files_of(account, entry))}"
            own = _own_codes(reader, entry, spec, groups) if parameter.is_meta else None
            if own is None:
                value = _checked(_local(numbers, entry, spec, groups), parameter, where)
                if parameter.is_meta and keeps_codes:  # what the files have left as it is stays so
                    parameter = stored_fp8.allocate(chunk, name)
                if not parameter.is_meta:
                    parameter.copy_(value)
                    continue
                stored, bits, lost = _rounded(value.to(spec.dtype), entry, groups)
                total += lost
            else:
                stored, bits = own, None
                _checked(stored_fp8.decoded(*own), parameter, where)
            stored_fp8.store(chunk, name, stored_fp8.Fp8Weight(stored, (DECODED, spec.dtype), bits))
    return total


def _own_codes(reader: CheckpointReader, entry: Entry, spec: ModelSpec, groups: Groups) -> tuple[Tensor, Tensor] | None:
    """This rank's E4M3 codes and their scales as the files have them, cut and joined as weights are; None where they have others."""
    account = spec.opened
    names = [name for each in entry.names for name in account.disk.names_of(each, _rows(entry))]
    scales = [account.values.scales(name) for name in names]
    if not names or None in scales:
        return None
    both = (account.values.codes(reader), account.values.factors(reader))
    codes_RC, factors_RC = (_local(_Source.of(read), entry, spec, groups) for read in both)
    # along the rows too, where a transposed matrix has its blocks the other way
    blocks = [each.block[::-1] for each in scales if each is not None]
    whole, columns = _whole_columns(codes_RC, entry, groups), codes_RC.shape[1]
    shared = [math.gcd(*(stored_fp8.columns_of_scale(columns, whole, size) for size in sizes)) for sizes in zip(*blocks, strict=True)]
    return codes_RC.contiguous().view(torch.float8_e4m3fn), stored_fp8.grouped(factors_RC, [shared[0], math.gcd(*shared)])


def _rounded(weight_RC: Tensor, entry: Entry, groups: Groups) -> tuple[tuple[Tensor, Tensor], int, Rounding]:
    """Codes and scales of this rank's part, the sum of its bits before, and what was lost."""
    whole = _whole_columns(weight_RC, entry, groups)
    stored = stored_fp8.rounded(weight_RC, stored_fp8.columns_of_scale(weight_RC.shape[1], whole, stored_fp8.BLOCK))
    exact = weight_RC.double()
    errors = float((stored_fp8.decoded(*stored).double() - exact).square().sum())
    return stored, bit_sum(weight_RC), Rounding(1, errors, float(exact.square().sum()))


def _whole_columns(part_RC: Tensor, entry: Entry, groups: Groups) -> int:
    """Columns of the matrix that this rank has a part of."""
    return part_RC.shape[1] * (_share(entry, groups)[0] if entry.rule.split == 1 else 1)


def files_of(account: Account, entry: Entry) -> tuple[str, ...]:
    """The tensors in the files that a parameter is made of; those of all experts where they stand in one."""
    found = (name for tensor in entry.names for name in account.disk.names_of(tensor, _rows(entry)))
    return tuple(stored for name in found for stored in account.values.stored(name))


def _rows(entry: Entry) -> slice | None:
    return None if entry.expert is None else slice(entry.expert, entry.expert + 1)


def require_one_table(spec: ModelSpec) -> None:
    """UserError for tied embeddings beside a head of its own: stock transformers keeps both, this model has one."""
    index, values, embedding, head = spec.opened.index, spec.opened.values, "model.embed_tokens.weight", "lm_head.weight"
    if not spec.dims.tied_embeddings or not {head, embedding} <= values.shapes.keys():
        return
    with CheckpointReader(index) as reader:
        if values.is_stored(head) and values.is_stored(embedding):
            same = reader.equal(head, embedding)
        else:  # their scales count
            read = values.reader(reader)
            same = torch.equal(read(head, None), read(embedding, None))
    if not same:
        raise UserError(
            f"{index.directory}: tie_word_embeddings is true, and {head} differs from {embedding}",
            "one table of embeddings, or a config.json that says there are two",
            'set "tie_word_embeddings": false in config.json, which is how stock transformers reads it',
        )


class OfRank(NamedTuple):
    """A parameter (or stored buffer) of a rank.

    tensor: its value, made now where it is kept in FP8. counts: whether this rank counts it in sums over all ranks: those that hold copies
    do not, so that every value counts once. bits: of one that was rounded to FP8, `bit_sum` of what the files hold.
    """

    tensor: Tensor
    entry: Entry
    counts: bool
    bits: int | None


def weights_of_rank(chunks: Sequence[HeadlessGPT], spec: ModelSpec, groups: Groups) -> Iterator[OfRank]:
    """Everything of the stock class that this rank holds."""
    for chunk in chunks:
        mapping = _mapping(chunk, spec, groups)
        plain = ((name, tensor, None) for name, tensor in _stored(chunk))
        for name, tensor, bits in itertools.chain(plain, stored_fp8.stored(chunk)):
            entry = mapping.entry(name)
            yield OfRank(tensor, entry, _counts(entry, groups) and not mapping.is_copy(name), bits)


def named_of_rank(chunks: Sequence[HeadlessGPT], spec: ModelSpec, groups: Groups) -> Iterator[tuple[HeadlessGPT, str, Tensor, Entry]]:
    """Every parameter and stored buffer with its chunk and its name there."""
    for chunk in chunks:
        mapping = _mapping(chunk, spec, groups)
        yield from ((chunk, name, tensor, mapping.entry(name)) for name, tensor in _stored(chunk))


def _mapping(chunk: HeadlessGPT, spec: ModelSpec, groups: Groups) -> WeightMapping:
    first_layer = get_transformer_layer_offset(chunk.config, chunk.vp_stage, groups.stage)
    return WeightMapping(spec, first_layer, groups.expert_rank * (spec.dims.experts // groups.parallel.expert))


def _counts(entry: Entry, groups: Groups) -> bool:
    own = groups.collection
    replicas, slices = (own.expt_dp, own.expt_tp) if entry.is_expert else (own.dp_cp, own.tp)
    return replicas.rank() == 0 and (entry.rule.split is not None or slices.rank() == 0)


def _checked(value: Tensor, parameter: Tensor, where: str) -> Tensor:
    if value.shape != parameter.shape:
        raise UserError(
            f"{where} give {list(value.shape)}",
            f"{list(parameter.shape)} by config.json",
            "check that config.json and the weights are of the same model",
        )
    if not torch.isfinite(value).all():
        raise UserError(f"{where}: NaN or infinite values", "finite weights", "get the weights again")
    return value


@dataclass(frozen=True)
class _Source:
    """What is read of tensors: numbers, codes, or factors. read: all of one, or rows. part: a share along an axis."""

    read: ReadTensor
    part: Callable[[str, int, tuple[int, int]], Tensor]

    @classmethod
    def of(cls, read: ReadTensor) -> _Source:
        """What can be read whole, and by rows."""
        return cls(read, partial(cut, read))


def _local(source: _Source, entry: Entry, spec: ModelSpec, groups: Groups) -> Tensor:
    """This rank's slice of one Megatron parameter, read alone where it lies in one piece."""
    rule, account, share = entry.rule, spec.opened, _share(entry, groups)
    parts, _ = share
    if rule.split is None or splits_heads(rule.kind, spec.dims, parts) or not _is_stored_as_it_is(account, entry):
        return local_slices(_whole(account, source.read, entry), entry, spec, groups)
    names = [name for each in entry.names for name in account.disk.names_of(each)]
    slices = [_slice(source, account.values.shapes[name], name, rule, share) for name in names]
    return join(rule.kind, slices, spec.dims.kv_heads // parts)


def local_slices(whole: Sequence[Tensor], entry: Entry, spec: ModelSpec, groups: Groups) -> Tensor:
    """This rank's slice of one Megatron parameter, from the whole matrices that it is joined from."""
    rule, (parts, rank) = entry.rule, _share(entry, groups)
    axis, kv_heads = rule.split, spec.dims.kv_heads
    if axis is None:
        return join(rule.kind, whole, kv_heads)
    if splits_heads(rule.kind, spec.dims, parts):
        return join(rule.kind, whole, kv_heads).chunk(parts, axis)[rank]
    slices = []
    for tensor in whole:
        start, stop, step = _range(tensor.shape[axis], rule, (parts, rank))
        slices.append(_padded(tensor.narrow(axis, start, stop - start), rule, step))
    return join(rule.kind, slices, kv_heads // parts)


def _range(size: int, rule: WeightRule, share: tuple[int, int]) -> tuple[int, int, int]:
    """Of an axis of this size: first and last that the files have for a rank, and how many it holds."""
    parts, rank = share
    step = (padded_vocabulary(size) if rule.kind == "vocab" else size) // parts
    return min(rank * step, size), min((rank + 1) * step, size), step


def _is_stored_as_it_is(account: Account, entry: Entry) -> bool:
    """Whether the tensors in the files are the matrices themselves, so that a rank can read its part alone."""
    place = entry.ffn
    same = place is None or not (place.packed or place.transposed or place.experts)
    return same and all(account.disk.is_plain(name) for name in entry.names)


def _slice(source: _Source, shape: tuple[int, ...], name: str, rule: WeightRule, share: tuple[int, int]) -> Tensor:
    assert rule.split is not None, "others are read whole"
    start, stop, step = _range(shape[rule.split], rule, share)
    return _padded(source.part(name, rule.split, (start, stop)), rule, step)


def _padded(rows: Tensor, rule: WeightRule, count: int) -> Tensor:
    """With zero rows for the padded end of the vocabulary."""
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])]) if rule.kind == "vocab" else rows


def _whole(account: Account, read: ReadTensor, entry: Entry) -> list[Tensor]:
    """What `join` takes, from tensors that have to be converted first."""
    if entry.ffn is None:
        return [account.disk.tensor(name, read) for name in entry.names]
    in_model, rows = dict(zip(entry.ffn.names_of(entry.part), entry.names, strict=True)), _rows(entry)

    def tensor(name: str) -> Tensor:
        found = account.disk.tensor(in_model[name], read, rows)
        return found if rows is None else found[0]

    return entry.ffn.read_part(entry.part, tensor)


def _share(entry: Entry, groups: Groups) -> tuple[int, int]:
    """In how many parts tensor parallelism splits this parameter, and which of them is this rank's."""
    parts = groups.parallel.expert_tensor if entry.is_expert else groups.parallel.tensor
    return parts, groups.tensor_rank if parts > 1 else 0


def _stored(model: HeadlessGPT) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are not kept in FP8, and the buffers that are part of a checkpoint (a router's correction)."""
    yield from (each for each in model.named_parameters() if stored_fp8.is_plain(each[0]))
    names = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in names)


def unload(model: HeadlessGPT, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model built whole (tensor = pipeline = expert = 1) as the stock class saves them, vocabulary padding removed.

    Tensors of all experts of a layer are gathered first; a router that has nothing to choose from is zero.
    """
    plain = plain_names(spec.stock, spec.stock.shapes)
    for name, tensor in _in_class(model, spec):
        yield from [(plain[name], tensor)] if name in plain else revert(spec.stock, {name: tensor}).items()


def _in_class(model: HeadlessGPT, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the stock class."""
    mapping = WeightMapping(spec)
    experts: dict[str, list[Tensor]] = {}
    for name, parameter in _stored(model):
        if mapping.is_copy(name):
            continue
        entry = mapping.entry(name)
        tensors: Sequence[Tensor] = split(entry.rule.kind, parameter.detach(), spec.dims)
        if entry.ffn is not None:
            tensors = [tensor for _, tensor in entry.ffn.write_part(entry.part, tensors)]
        if entry.expert is None:
            yield from zip(entry.names, tensors, strict=True)
            continue
        assert entry.ffn is not None, "experts are FFNs"
        for each, tensor in zip(entry.names, tensors, strict=True):
            gathered = experts.setdefault(each, [])
            assert len(gathered) == entry.expert, "experts come in the order of their numbers"
            gathered.append(tensor)
            if len(gathered) == entry.ffn.experts:
                yield each, torch.stack(experts.pop(each))
    assert not experts, "every layer has all its experts"
    for name, shape in spec.idle_router().items():
        yield name, torch.zeros(shape, dtype=spec.dtype)
