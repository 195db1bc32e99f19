"""What runs inside the worker processes of the distributed tests."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from megatron_moe2dense.trainer.data.samples import Batch
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime
from megatron_moe2dense.trainer.teacher import LiveTeacher
from megatron_moe2dense.trainer.verification import fingerprint
from megatron_moe2dense.trainer.verification.fingerprint import Fingerprint
from megatron_moe2dense.trainer.weights import Rounding


def distill_all(configs: list[dict[str, Any]]) -> None:
    """Run `distill` for several configs, one after the other, in the same processes."""
    from megatron_moe2dense.trainer import distill

    for config in configs:
        distill.run(build(DistillConfig, config, "the test"))


def loaded(directory: Path, place: tuple[Groups, Runtime], dtype: str) -> tuple[list[HeadlessGPT], ModelSpec]:
    """The checkpoint as a Megatron model in the current layout, in eval mode."""
    spec = ModelSpec.open(directory, getattr(torch, dtype))
    return loaded_as(spec, place)[0], spec


def loaded_as(spec: ModelSpec, place: tuple[Groups, Runtime]) -> tuple[list[HeadlessGPT], Rounding]:
    """As `loaded`, of an opened checkpoint, and what loading it has lost."""
    chunks = models.build(spec, *place, PipelineLayout.of_student(place[0].parallel, spec.dims.layers))
    lost = weights.load(chunks, spec, place[0])
    return [chunk.requires_grad_(not spec.in_fp8).eval() for chunk in chunks], lost


def against_dequantised(cases: list[tuple[Path, Path, dict[str, Any], str]]) -> list[tuple[list[str], int, int]]:
    """Of an FP8 checkpoint kept in FP8, its dequantised copy, a layout and a dtype: names of what differs on any rank, weights or final
    hidden states, and the bytes of both."""
    found = []
    with runtime.session("cpu") as device:
        for packed, plain, layout, dtype in cases:
            with process_groups.initialized(ParallelConfig(**layout), seed=0) as groups:
                stored, copy = (
                    dataclasses.replace(ModelSpec.open(each, getattr(torch, dtype)), in_fp8=each == packed) for each in (packed, plain)
                )
                both = [LiveTeacher(loaded_as(spec, (groups, device))[0], spec) for spec in (stored, copy)]
                of_plain = {
                    (each.entry.names, each.entry.expert): each.tensor for each in weights.weights_of_rank(both[1].chunks, copy, groups)
                }
                mine = list(weights.weights_of_rank(both[0].chunks, stored, groups))
                differ = [
                    str(each.entry.names) for each in mine if not torch.equal(each.tensor, of_plain[each.entry.names, each.entry.expert])
                ]
                assert len(mine) == len(of_plain)
                fingerprint.verify(both[0].chunks, stored, groups)
                tokens = torch.randint(0, stored.dims.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
                batch = Batch(tokens, tokens, torch.ones(2, 16), torch.arange(16).expand(2, -1), (0, 1))
                hidden = [each.targets([batch]) for each in both]
                differ += ["hidden states"] * any(not torch.equal(*pair) for pair in zip(*hidden, strict=True))
                ranks: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(ranks, differ)
                sizes = [sum(tensor.nbytes for chunk in each.chunks for tensor in chunk.parameters()) for each in both]
                found.append(([name for names in ranks for name in names], *sizes))
    return found


def memory_of_loading(directory: Path) -> tuple[int, int, int]:
    """Bytes that a process grows by at most while it loads a checkpoint into FP8, what the model takes then, and would take in bfloat16."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        spec = dataclasses.replace(ModelSpec.open(directory, torch.bfloat16), in_fp8=True)
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system
        before = field("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        chunks, _ = loaded_as(spec, (groups, device))
        grown = field("VmHWM") - before
        held = sum(tensor.nbytes for chunk in chunks for tensor in chunk.parameters())
        plain = sum(2 * each.tensor.numel() for each in weights.weights_of_rank(chunks, spec, groups))
        return grown, held, plain


def fingerprints(cases: list[tuple[Path, list[dict[str, Any]]]]) -> list[list[Fingerprint]]:
    """Of every checkpoint in its layouts, verified."""
    return [[_fingerprint(directory, ParallelConfig(**layout)) for layout in layouts] for directory, layouts in cases]


def _fingerprint(directory: Path, parallel: ParallelConfig) -> Fingerprint:
    with runtime.session("cpu") as device, process_groups.initialized(parallel, seed=0) as groups:
        chunks, spec = loaded(directory, (groups, device), "bfloat16" if directory.name == "tied" else "float32")
        return fingerprint.verify(chunks, spec, groups)


def global_tensors(cases: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, torch.Tensor]]:
    """Of every checkpoint in its layout: all weights of all ranks, put together as Megatron's own sharded state dict places them."""
    found = []
    with runtime.session("cpu") as device:
        for layout, group in itertools.groupby(cases, key=lambda case: case[1]):
            with process_groups.initialized(ParallelConfig(**layout), seed=0) as groups:
                for directory, _ in group:
                    ranks: list[Any] = [None] * dist.get_world_size()
                    dist.all_gather_object(ranks, _placed_shards(loaded(directory, (groups, device), "float32")[0], groups))
                    found.append(_put_together([shard for rank in ranks for shard in rank]))
    return found


def _placed_shards(chunks: list[HeadlessGPT], groups: Groups) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """Name, shape of the whole, place in it, values."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    placed = []
    for chunk in chunks:
        for item in nested_values(chunk.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})):
            parts = nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item]
            for part in parts:
                if isinstance(part, ShardedTensor) and part.data is not None:
                    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
                    where = tuple(slice(start, start + size) for start, size in zip(part.global_offset, shape, strict=True))
                    placed.append((part.key, tuple(part.global_shape), where, part.data.detach().clone().view(shape)))
    return placed


def _put_together(shards: list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for name, shape, where, values in shards:
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        assert target[where].isnan().all() or target[where].equal(values), f"copies of {name} differ between ranks"
        target[where] = values
    return whole


def loss_and_gradients(cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Loss per token, gradients of hidden states (summed over ranks) and of the whole head, and the measures; the vocabulary is split
    over all processes."""
    from megatron_moe2dense.trainer.losses import losses, measures
    from megatron_moe2dense.trainer.losses.targets import TopKTarget
    from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits

    world, rank, results = (dist.get_world_size(), dist.get_rank(), []) if dist.is_initialized() else (1, 0, [])
    group = dist.group.WORLD if world > 1 else None
    for case in cases:
        hidden = case["hidden"].clone().requires_grad_(True)
        head = case["head"].chunk(world)[rank].clone().requires_grad_(True)
        student = VocabParallelLogits.of(hidden, head, case["vocab"], group)
        teacher = VocabParallelLogits.of(case["teacher_hidden"], case["teacher_head"].chunk(world)[rank].clone(), case["vocab"], group)
        loss = losses.build(case["loss"])
        known = TopKTarget.of_logits(teacher.logits(slice(None)), case["cached"], teacher.start, group) if "cached" in case else teacher
        loss_T = loss.per_token(student, known if loss.needs_teacher else None, case["labels"], case["mask"])
        ((loss_T * case["mask"]).sum() * case["scale"]).backward()
        assert hidden.grad is not None
        grad_head = head.grad if head.grad is not None else torch.zeros_like(head)  # a loss of hidden states leaves the head alone
        parts = [grad_head]
        if world > 1:
            dist.all_reduce(hidden.grad)
            parts = [torch.empty_like(grad_head) for _ in range(world)]
            dist.all_gather(parts, grad_head)
        measured_NT = measures.per_token(student, teacher, case["labels"])
        results.append({"loss": loss_T.detach(), "hidden": hidden.grad, "head": torch.cat(parts), "measures": measured_NT})
    return results
