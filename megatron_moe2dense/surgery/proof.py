"""Before anything long is written: what the dense stock class computes with the FFN that it will load, against the MoE block of the source
with its routing held constant, on the first MoE layer's own weights (docs/method.md#from-an-moe-layer-to-a-dense-ffn)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.disk import Disk, ReadTensor
from megatron_moe2dense.families.probe import first_of, random_tokens, run_block
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.surgery.dense_block import DenseBlock
from megatron_moe2dense.surgery.layout import dense_of, layer_ffn, stored_ffn
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.types import LayerPlan

EXACT = 1e-5  # of a token's largest value, in float32
_SIZES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of tokens: small ones, and some that clamps hold back
_COPIES = 4  # of each expert in float32: as it is read, scaled, stored and loaded
_SHARE = 0.4  # a constant gate of shared experts, or of inputs


@torch.no_grad()
def prove(source: MoeSource, reader: CheckpointReader, groups: int, memory_budget: int) -> float:
    """The largest difference on random tokens of several sizes, as a share of a token's largest value.

    Args:
        reader: open on the source. groups: experts side by side in the dense FFN; fewer where the layer has fewer, or the memory budget
            [bytes] does not hold so many.

    Raises:
        UserError: it is larger than 1e-5.
    """
    layer = source.layers[0]
    expert_bytes = _COPIES * 3 * 4 * source.dims.hidden_size * source.dims.expert_width
    groups = max(1, min(groups, source.dims.experts, memory_budget // expert_bytes))
    scales = tuple(0.5 + group / groups for group in range(groups))
    chosen, shared = tuple(range(groups)), _shared_scale(source, layer)
    plan = LayerPlan(layer, chosen, chosen, (1.0,) * groups, scales, shared, input_scale=_input_scale(source))
    read = _in_float32(source.reader(reader))
    tokens = torch.cat([size * random_tokens(source.stock) for size in _SIZES], dim=1)
    expected = _of_moe(source, read, plan, tokens)
    found = _of_dense(source, read, plan, tokens).view_as(expected)
    held = expected.isfinite().all(-1)  # the largest tokens may lead beyond what float32 holds
    if not held.any():
        raise UserError(
            f"{source.index.directory}: layer {layer} gives no finite output, for tokens of size {_SIZES[0]} either",
            "weights with which float32 can compute",
            "compare the checkpoint with the published one",
        )
    expected, found = expected[held], found[held]
    error = ((found - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-30)).max().item()
    if not error <= EXACT:
        dense = dense_of(source, groups).stock.name
        raise UserError(
            f"{source.index.directory}: with constant routing layer {layer} and its {dense} differ by {error:.1e}",
            f"the MoE block's own output within {EXACT:.0e}",
            "nothing was written; please report config.json and this line",
        )
    return error


def _shared_scale(source: MoeSource, layer: int) -> float:
    """That of a plan; 1 where there is no gate that could be held at another value."""
    return 1.0 if source.stock.moe[layer].shared_gate is None else _SHARE


def _input_scale(source: MoeSource) -> float:
    return _SHARE if source.facts_of_block.gates_inputs else 1.0


def _in_float32(read: ReadTensor) -> ReadTensor:
    def numbers(name: str, rows: slice | None) -> torch.Tensor:
        tensor = read(name, rows)
        return tensor.float() if tensor.is_floating_point() else tensor

    return numbers


class _Constant(nn.Module):
    """In the place of the experts: always the same ones, whatever the router says."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self._compute = compute

    def forward(self, x: torch.Tensor, *_arguments: Any, **_more: Any) -> torch.Tensor:
        """[..., D] to the same shape."""
        return self._compute(x)


def _of_moe(source: MoeSource, read: ReadTensor, plan: LayerPlan, x: torch.Tensor) -> torch.Tensor:
    place, stock = source.stock.moe[plan.layer], source.stock

    def experts(tokens: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(tokens)
        for expert, scale in zip(plan.experts, plan.scales, strict=True):
            block = DenseBlock(source.gating(plan.layer))
            block.ffn = source.expert(read, plan.layer, expert)
            total += scale / source.routed_factor * block(tokens)  # a plan's scales are weights in the block's output
        return total

    if not place.block:
        return experts(x)
    inside = torch.zeros_like if source.facts_of_block.gates_inputs else experts
    block = _loaded(stock, plan.layer, place.block, lambda name: source.disk.tensor(name, read), (place.called, _Constant(inside)))
    gate = place.shared_gate if place.shared_gate is not None and not source.form.has_shared else None
    with _held(block, None if gate is None else gate.removesuffix(".weight").removeprefix(f"{place.block}."), plan.shared_scale):
        y = first_of(run_block(block, x)).view_as(x)
    if source.facts_of_block.gates_inputs:
        y = y + experts(plan.input_scale * x)
    into = source.form.exception.into
    if into is not None:
        y = y + _loaded(stock, plan.layer, into, lambda name: source.disk.tensor(name, read))(x)
    return y


def _of_dense(source: MoeSource, read: ReadTensor, plan: LayerPlan, x: torch.Tensor) -> torch.Tensor:
    dense, form = dense_of(source, len(plan.experts)), source.form
    stored = stored_ffn(dense, plan.layer, layer_ffn(source, read, plan.layer, plan))
    disk = Disk(dense.stock, {name: tuple(tensor.shape) for name, tensor in stored.items()})

    def made(name: str, rows: slice | None) -> torch.Tensor:
        return stored[name] if rows is None else stored[name][rows]

    def tensor(name: str) -> torch.Tensor:
        if disk.names_of(name):
            return disk.tensor(name, made)
        own = source.stock.in_model(plan.layer, name.removeprefix(dense.stock.in_model(plan.layer, "")))
        assert form.takes(own) == name, "what is not made stands in the source"
        return source.disk.tensor(own, read)

    slots, moe = dense.slots[plan.layer], dense.stock.moe.get(plan.layer)
    if moe is None:
        return _loaded(dense.stock, plan.layer, slots[0].place.path, tensor)(x)
    if moe.block:
        return first_of(run_block(_loaded(dense.stock, plan.layer, moe.block, tensor), x))
    experts = _loaded(dense.stock, plan.layer, moe.called, tensor)
    gates = torch.tensor([[slot.factor for slot in slots]]).expand(x.shape[1], -1)
    return experts(x[0], torch.arange(len(slots)).expand_as(gates), gates)[None]


def _loaded(
    stock: Stock, layer: int, path: str, tensor: Callable[[str], torch.Tensor], put: tuple[str, nn.Module] | None = None
) -> nn.Module:
    """A module of a layer with its weights on the CPU, by `tensor`. put: another one in the place of one inside it."""
    whole = stock.layers[layer]
    memo: dict[int, Any] = {} if put is None else {id(whole.get_submodule(put[0])): put[1]}
    module = copy.deepcopy(whole.get_submodule(path), memo).float()
    state = {name: tensor(stock.in_model(layer, f"{path}.{name}")) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    stock.make_buffers(module, torch.device("cpu"))
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
    return module.eval()


@contextmanager
def _held(block: nn.Module, gate: str | None, share: float) -> Iterator[None]:
    """The sigmoid gate of shared experts at one value."""
    if gate is None:
        yield
        return
    logit = math.log(share / (1 - share))

    def constant(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, logit)

    hook = block.get_submodule(gate).register_forward_hook(constant)
    yield
    hook.remove()
