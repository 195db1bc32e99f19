"""A user error of one rank becomes the user error of all, so that no rank waits in a collective for one that is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megatron_moe2dense.common.errors import UserError


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """To be entered by all ranks; afterwards either all go on, or all raise the first rank's UserError. No collectives inside."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = error
    described: list[tuple[str, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(described, problem and (problem.found, problem.expected, problem.do))
    first = next((found for found in described if found is not None), None)
    if first is not None:
        raise problem or UserError(*first)
