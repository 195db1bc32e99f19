"""What a stock MoE block does with its parts, asked of the block itself: random weights and tokens, and a stand-in for the experts."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.stock import MoePlace, Stock

_TOKENS = 64
_EXACT = 1e-5
_ROUTING = r"top_?k|scor|rout|group"  # in names of config keys
Score = Callable[[torch.Tensor], torch.Tensor]

# What a router may make of its logits before it selects and weighs, by name.
SCORES: dict[str, Score] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    "probabilities": lambda logits: logits,
}


@dataclass(frozen=True)
class BlockFacts:
    """Of a MoE block y(x) = routed_factor * sum_e g_e(x) f_e(x) + shared_factor * [gate] shared(x).

    Attributes:
        active: experts a token. score: what the gates are proportional to, of SCORES.
        routed_factor: None where the block is no such sum (a norm over it): the experts alone can be replaced then.
        returns_more: the block returns a tuple whose first entry is y.
        gates_inputs: y(x) = sum_e f_e(g_e(x) x) instead, of one expert a token.
    """

    active: int
    score: str
    routed_factor: float | None
    shared_factor: float
    returns_more: bool
    gates_inputs: bool = False


class StandIn(nn.Module):
    """In the place of the experts: keeps what they are called with and returns what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.value: torch.Tensor | None = None
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, *arguments: Any, **_more: Any) -> torch.Tensor:
        """Its value in the shape of the first argument, or zeros."""
        self.calls.append(arguments)
        x = arguments[0]
        return torch.zeros_like(x) if self.value is None else self.value.reshape(x.shape).to(x)


def real(module: nn.Module, without: nn.Module | None = None, put: nn.Module | None = None, seed: int = 0) -> nn.Module:
    """A copy of a meta module on the CPU in float32, random weights of a trained one's size; `without` in it becomes `put`."""
    found = copy.deepcopy(module, {} if without is None else {id(without): put}).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(seed)
    for parameter in found.parameters():
        spread = 1.0 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * spread
        parameter.data.copy_(drawn if parameter.ndim > 1 else 1 + 0.1 * drawn)
    for buffer in found.buffers():
        buffer.zero_()
    return found.eval().requires_grad_(False)


@torch.no_grad()
def probe(stock: Stock, place: MoePlace) -> BlockFacts:
    """The facts of one layer's MoE. UserError when the block does not run with this config."""
    try:
        return _probe(stock, place)
    except (RuntimeError, ValueError, TypeError, AttributeError, UnboundLocalError, StopIteration) as error:
        said = ", ".join(f"{name} {value!r}" for name, value in vars(stock.config).items() if re.search(_ROUTING, name))
        raise UserError(
            f"{stock.name}: a MoE block that stock transformers can not run ({error}) with {said}",
            "a config as it was published",
            "compare config.json with the published one",
        ) from None


def _probe(stock: Stock, place: MoePlace) -> BlockFacts:
    layer = stock.layers[place.layer]
    experts = layer.get_submodule(place.called)
    stand_in = StandIn()
    block = real(layer.get_submodule(place.block), experts, stand_in) if place.block else None
    router = layer.get_submodule(place.router)
    routed: list[Any] = []
    if block is None:
        routed.append(real(router)(random_tokens(stock)[0]))
        indices, weights = _of_router(routed[0])
        return BlockFacts(indices.shape[-1], _score(stock, routed[0], indices, weights), None, 1.0, False)
    own = block.get_submodule(place.router.removeprefix(f"{place.block}."))
    own.register_forward_hook(lambda _module, _inputs, output: routed.append(output))
    x = random_tokens(stock)
    first = run_block(block, x)
    nothing = first_of(first)
    call = stand_in.calls[-1]
    if len(call) == 1:
        return _gating_inputs(stock, routed[0][0], call[0], x, _shared_factor(block, place, x, nothing))
    value = torch.randn(call[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    stand_in.value = value
    both = first_of(run_block(block, x))
    factor = _factor((both - nothing).reshape(-1, both.shape[-1]), value.reshape(-1, value.shape[-1]))
    indices = next(item for item in call if _is_index(item))
    weights = next(item for item in call[1:] if not _is_index(item) and torch.is_tensor(item))
    score = _score(stock, routed[0], indices, weights)
    return BlockFacts(indices.shape[-1], score, factor, _shared_factor(block, place, x, nothing), isinstance(first, tuple))


def _gating_inputs(stock: Stock, gates_TE: torch.Tensor, called: torch.Tensor, x: torch.Tensor, shared_factor: float) -> BlockFacts:
    """Of a block that calls its experts with all tokens times their gates. ValueError where it does anything else."""
    if not torch.equal(called.view(gates_TE.shape[1], *x.shape[1:]), gates_TE.T[..., None] * x):
        raise ValueError("experts called with something else than tokens times gates")
    if ((gates_TE != 0).sum(-1) != 1).any():
        raise UserError(
            f"{stock.name}: several experts a token, with gates that multiply what goes into them",
            "one expert a token, as in the published models",
            "docs/families.md lists what can be converted",
        )
    return BlockFacts(1, "sigmoid", 1.0, shared_factor, True, gates_inputs=True)


@torch.no_grad()
def routes_in(stock: Stock, place: MoePlace, dtype: torch.dtype) -> bool:
    """Whether a router with weights of that type runs on tokens of it: some cast what comes in to float32, and their weights nowhere."""
    router = real(stock.layers[place.layer].get_submodule(place.router)).to(dtype)
    try:
        router(random_tokens(stock)[0].to(dtype))
    except (RuntimeError, TypeError) as error:  # a router that wants more than tokens is taken to run
        return not (isinstance(error, RuntimeError) and "dtype" in str(error))
    return True


def random_tokens(stock: Stock) -> torch.Tensor:
    """[1, T, D], the same ones every time."""
    hidden = stock.config.hidden_size if hasattr(stock.config, "hidden_size") else stock.config.d_model
    return torch.randn(1, _TOKENS, hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float32)


def run_block(block: nn.Module, x: torch.Tensor) -> Any:
    """What a stock MoE block, or an FFN in its place, makes of [B, T, D]; one that routes by token id gets token 0."""
    more = {"input_ids": torch.zeros(x.shape[:2], dtype=torch.long)} if "input_ids" in inspect.signature(block.forward).parameters else {}
    return block(x.clone(), **more)


def first_of(output: Any) -> torch.Tensor:
    """The hidden states among what a block or a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _is_index(item: Any) -> bool:
    return torch.is_tensor(item) and not item.is_floating_point()


def _of_router(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights out of a router's outputs."""
    tensors = [item for item in output if torch.is_tensor(item)]
    indices = next(item for item in tensors if _is_index(item))
    return indices, next(item for item in tensors if item.shape == indices.shape and not _is_index(item))


def _factor(found: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """a where found = a wanted; None where it is not."""
    if found.shape != wanted.shape:
        return None
    factor = float((found * wanted).sum() / (wanted * wanted).sum())
    near = round(factor, 4)  # factors of configs, such as 2.5, without the noise of float32
    factor = near if abs(near - factor) < 1e-5 * max(1.0, abs(factor)) else factor
    return factor if (found - factor * wanted).norm() <= _EXACT * found.norm() else None


def _shared_factor(block: nn.Module, place: MoePlace, x: torch.Tensor, nothing: torch.Tensor) -> float:
    """What the sum of the shared experts is multiplied by; a gate of their own is left to its weights."""
    if not place.shared or place.shared_gate is not None:
        return 1.0
    inside = f"{place.block}."
    total = torch.stack([block.get_submodule(shared.path.removeprefix(inside))(x) for shared in place.shared]).sum(0)
    factor = _factor(nothing.reshape(-1, nothing.shape[-1]), total.reshape(-1, total.shape[-1]))
    return 1.0 if factor is None else factor


def _score(stock: Stock, output: Any, indices: torch.Tensor, weights: torch.Tensor) -> str:
    """Of SCORES, the one that the gates are, or are proportional to within a token."""
    logits = logits_of(stock, output)
    if (logits >= 0).all() and ((logits.sum(-1) - 1).abs() < _EXACT).all():
        return "probabilities"
    chosen = {
        name: score(logits).reshape(-1, logits.shape[-1]).gather(1, indices.reshape(len(indices.flatten()) // indices.shape[-1], -1))
        for name, score in SCORES.items()
    }
    weights = weights.reshape(-1, weights.shape[-1])
    for name, each in chosen.items():
        if (each - weights).abs().max() < _EXACT:
            return name
    for name, each in chosen.items():
        ratio = weights / each
        if torch.isfinite(ratio).all() and (ratio.amax(-1) - ratio.amin(-1)).abs().max() < 1e-4 * ratio.abs().max():
            return name
    return "softmax"


def logits_of(stock: Stock, output: Any) -> torch.Tensor:
    """Logits out of a router's outputs, the entry that transformers itself records: [T, E], wider where there is more to choose."""
    recorded = getattr(stock.model, "_can_record_outputs", None) or getattr(stock.base, "_can_record_outputs", None) or {}
    index = getattr(recorded.get("router_logits"), "index", 0) or 0
    logits = output[index] if isinstance(output, tuple) else output
    return logits.reshape(-1, logits.shape[-1])
