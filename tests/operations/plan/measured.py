"""What one step of a real run holds and sends on every rank, measured from outside: storages, saved tensors, collectives."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.config import DistillConfig

# Of the collectives of `ProcessGroup`: which argument says how much goes over the wire, and what it is called in a plan.
_PAYLOAD = {
    "allreduce": (0, "all-reduce"),
    "allreduce_coalesced": (0, "all-reduce"),
    "broadcast": (0, "broadcast"),
    "allgather": (0, "all-gather"),
    "_allgather_base": (0, "all-gather"),
    "all_gather_single": (0, "all-gather"),
    "all_gather_single_coalesced": (0, "all-gather"),
    "allgather_into_tensor_coalesced": (0, "all-gather"),
    "reduce_scatter": (1, "reduce-scatter"),
    "_reduce_scatter_base": (1, "reduce-scatter"),
    "reduce_scatter_single": (1, "reduce-scatter"),
    "reduce_scatter_single_coalesced": (1, "reduce-scatter"),
    "reduce_scatter_tensor_coalesced": (1, "reduce-scatter"),
    "alltoall_base": (1, "all-to-all"),
    "all_to_all_single": (1, "all-to-all"),
    "send": (0, "send"),
}
_UNEXPECTED = ("reduce", "gather", "scatter", "allgather_coalesced", "alltoall")


def step_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """As `steps`, of one case, in this process alone."""
    return _step(build(DistillConfig, config, "the test"))


def steps(cases: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By case and rank: bytes of the parts and what the first step sent."""
    return {name: _step(build(DistillConfig, raw, name)) for name, raw in cases.items()}


def _step(config: DistillConfig) -> list[dict[str, Any]]:
    from megatron_moe2dense.trainer import distill, groups, runtime

    with runtime.session(config.device) as device, groups.initialized(config.parallel, config.train.seed) as place:
        distill.claim_output(config)
        trainer, state = distill.build(config, place, device)
        with contextlib.closing(trainer):
            with saved_bytes() as saved, sent_bytes(place.collection) as sent:
                trainer.advance(state)
            mine = {**_state_bytes(trainer), "activations": saved[0], "sent": {key: value for key, value in sent.items() if value}}
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, {"stage": place.stage, "shard": place.collection.dp_cp.rank(), **mine})
            return ranks


def storage_bytes(tensors: Any) -> int:
    """Of all storages behind the tensors, each once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _state_bytes(trainer: Any) -> dict[str, int]:
    parameters = [parameter for chunk in trainer.models.student for parameter in chunk.parameters()]
    inner = [part.optimizer for part in trainer.optimizer.chained_optimizers if part.optimizer is not None]
    moments = [entry[name] for adam in inner for entry in adam.state.values() for name in entry if name != "step"]
    held = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    masters = [shard for adam in inner for group in adam.param_groups for shard in group["params"]]
    own = [shard for shard in masters if shard.untyped_storage().data_ptr() not in held]
    teacher = getattr(trainer.models.teacher, "chunks", [])
    return {
        "parameters": storage_bytes(parameters),
        "gradients": storage_bytes(parameter.main_grad for parameter in parameters if parameter.requires_grad),
        "optimizer": storage_bytes([*moments, *own]),
        "teacher": storage_bytes(parameter for chunk in teacher for parameter in chunk.parameters()),
    }


class _Saved:
    """A tensor that autograd keeps; it goes when the backward pass lets it go."""

    def __init__(self, tensor: Tensor, release: Callable[[int], None]):
        self.tensor, self._release = tensor.detach(), release

    def __del__(self) -> None:
        self._release(self.tensor.untyped_storage().data_ptr())


@contextlib.contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """The most bytes that autograd keeps at once inside the block, each storage once, without parameters."""
    counts: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    peak = [0]

    def release(pointer: int) -> None:
        counts[pointer] -= 1
        if counts[pointer] == 0:
            del counts[pointer], sizes[pointer]

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        counts[storage.data_ptr()] += 1
        sizes[storage.data_ptr()] = storage.nbytes()
        peak[0] = max(peak[0], sum(sizes.values()))
        return _Saved(tensor, release)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, _Saved) else kept):
        yield peak


def _flat(tensors: Any) -> Iterator[Tensor]:
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for tensor in tensors:
            yield from _flat(tensor)


@contextlib.contextmanager
def sent_bytes(collection: Any) -> Iterator[Counter[tuple[str, str]]]:
    """Bytes handed to each kind of collective, by the group it goes over: the whole of an all-gather, what a rank puts into the others."""
    names = {}
    for name in ("embd", "expt_dp", "expt_tp", "ep", "tp_ep", "tp", "pp", "cp", "dp_cp", "dp"):
        group = getattr(collection, name, None)
        if group is not None and group.size() > 1:
            names[id(group)] = name
    sent: Counter[tuple[str, str]] = Counter()
    methods = {name: vars(dist.ProcessGroup)[name] for name in (*_PAYLOAD, *_UNEXPECTED) if hasattr(dist.ProcessGroup, name)}

    def wrapped(name: str, method: Any) -> Any:
        def call(group: Any, *args: Any, **options: Any) -> Any:
            assert name in _PAYLOAD, f"a collective that is not counted: {name}"
            where, kind = _PAYLOAD[name]
            if group.size() > 1:
                # two stages send over the world's group, in place of one of their own
                name_of_group = "pp" if kind == "send" else names.get(id(group), "world")
                sent[name_of_group, kind] += sum(tensor.nbytes for tensor in _flat(args[where]))
            return method(group, *args, **options)

        return call

    for name in methods:
        setattr(dist.ProcessGroup, name, wrapped(name, getattr(dist.ProcessGroup, name)))
    try:
        yield sent
    finally:
        for name, method in methods.items():
            setattr(dist.ProcessGroup, name, method)
