"""What runs inside the worker processes of the distributed tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.config import DistillConfig


def distill_all(configs: list[dict[str, Any]]) -> None:
    """Run `distill` for several configs, one after the other, in the same processes."""
    from megatron_moe2dense.trainer import distill

    for config in configs:
        distill.run(build(DistillConfig, config, "the test"))


def forward_kl(cases: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient with the vocabulary split over all processes. Returns [T] and [T, V] gathered, per case."""
    from megatron_moe2dense.trainer.losses import losses
    from megatron_moe2dense.trainer.losses.shards import VocabShard

    world, rank, results = dist.get_world_size(), dist.get_rank(), []
    for case in cases:
        student, teacher, vocab = case["student"], case["teacher"], case["vocab"]
        mine = student.chunk(world, -1)[rank].clone().requires_grad_(True)
        shards = [VocabShard.of(part, vocab, dist.group.WORLD) for part in (mine, teacher.chunk(world, -1)[rank].clone())]
        loss_T = losses["forward_kl"](temperature=case["temperature"]).per_token(*shards, torch.zeros(len(student), dtype=torch.long))
        (loss_T * case["weight"]).sum().backward()
        assert mine.grad is not None
        parts = [torch.empty_like(mine.grad) for _ in range(world)]
        dist.all_gather(parts, mine.grad)
        results.append((loss_T.detach(), torch.cat(parts, -1)))
    return results
