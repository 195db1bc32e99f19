"""Context parallelism: each rank holds two blocks of every sequence, r and 2C-1-r of 2C ("zig-zag"), so that causal work is even.

The order is that of Megatron-Core's `get_batch_on_this_cp_rank` and of its rotary embeddings and Transformer Engine attention.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor


def local_part(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's S / C positions of a tensor [B, S, ...]."""
    return get_batch_on_this_cp_rank({"tensor": tensor}, group)["tensor"]


def gather_sequence(x_SX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' positions along axis 0, rank after rank (`positions` says which they are); gradients are summed over the ranks."""
    return gather_from_sequence_parallel_region(x_SX, tensor_parallel_output_grad=True, group=group)


def positions(length: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in the sequence of this rank's `length` tokens, [S], and of what `gather_sequence` returns, [S * C]."""
    ranks = dist.get_world_size(group)
    blocks_NB = torch.arange(length * ranks, device=device).view(2 * ranks, length // 2)
    order = [block for rank in range(ranks) for block in (rank, 2 * ranks - 1 - rank)]
    all_RS = blocks_NB[order].view(ranks, length)
    return all_RS[dist.get_rank(group)], all_RS.flatten()
