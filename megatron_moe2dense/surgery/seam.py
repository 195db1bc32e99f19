"""Where a stock decoder layer calls its experts, and where a dense FFN runs in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_moe2dense.families.probe import SCORES, logits_of
from megatron_moe2dense.surgery.experts import Experts
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.source import MoeSource


class MoeWatcher:
    """Sees what goes into and out of the experts of every MoE layer that runs. T: tokens of a batch, flattened."""

    def routed(self, layer: int, x_TD: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
        """The weighted sum of the selected experts' outputs, [T, D]."""
        del layer
        f_TAD = experts.selected_outputs(x_TD, routing)
        return (routing.gates_TA.to(f_TAD.dtype)[..., None] * f_TAD).sum(1)

    def shared(self, layer: int, s_TD: torch.Tensor, gate_T1: torch.Tensor) -> None:
        """Of shared experts with a sigmoid gate of their own: their output without it, and it."""

    def gated(self, layer: int, gate_T: torch.Tensor) -> None:
        """Of a block that multiplies what goes into an expert by its gate: the gate of each token."""

    def passed(self, layer: int, x_TD: torch.Tensor, y_TD: torch.Tensor) -> None:
        """What went into that which a dense FFN takes the place of, and what came out."""


class Seam:
    """One MoE layer's.

    Args:
        layer: the stock decoder layer. number: which.
    """

    def __init__(self, layer: nn.Module, source: MoeSource | None, number: int):
        assert source is not None, "only a MoE has seams"
        self._layer, self._source, self._number = layer, source, number
        self._place = source.stock.moe[number]
        self._experts = layer.get_submodule(self._place.called)
        self._block = layer.get_submodule(self._place.block) if self._place.block else None
        self._hooks: list[Any] = []

    def replaces(self, name: str) -> bool:
        """Whether a parameter of the layer belongs to what a dense FFN takes the place of."""
        if self._source.seam == "block":
            return name.startswith(f"{self._place.block}.")
        return name in self._place.experts.names

    def route(self, weights: Experts, watcher: MoeWatcher) -> None:
        """The stock block routes; the experts are these."""
        number, stock = self._number, self._source.stock
        score = SCORES[self._source.facts_of_block.score]
        logits: list[torch.Tensor] = []
        router = self._layer.get_submodule(self._place.router)
        gates_inputs = self._source.facts_of_block.gates_inputs
        gates_of_inputs: list[torch.Tensor] = []

        def routes(_module: nn.Module, _inputs: Any, output: Any) -> None:
            logits.append(output[1] if gates_inputs else logits_of(stock, output))
            if gates_inputs:
                gates_of_inputs.append(output[0])

        self._hook(router, routes)

        def experts(x: torch.Tensor, *arguments: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
            given = [item for item in (*arguments, *more.values()) if torch.is_tensor(item)]
            indices_TA = next(item for item in given if not item.is_floating_point())
            gates_TA = next(item for item in given if item.is_floating_point())
            width = indices_TA.shape[-1]
            x_TD, count = x.reshape(-1, x.shape[-1]), weights.down_EDI.shape[0]
            probs_TE = score(logits.pop().to(torch.promote_types(x.dtype, torch.float32)))[:, :count]
            indices_TA, gates_TA = indices_TA.reshape(-1, width), gates_TA.reshape(-1, width)
            beyond_TA = indices_TA >= count  # experts without weights, which give back their input
            chosen = indices_TA.masked_fill(beyond_TA, 0), gates_TA.masked_fill(beyond_TA, 0.0)
            routing = Routing(*chosen, probs_TE, self._source.routed_factor)
            y_TD = watcher.routed(number, x_TD, routing, weights)
            if beyond_TA.any():
                y_TD = y_TD + (gates_TA * beyond_TA).sum(1, keepdim=True).to(x_TD.dtype) * x_TD
            if self._source.seam == "experts":
                watcher.passed(number, x_TD, y_TD)
            return y_TD.view_as(x)

        def gated_inputs(x_ND: torch.Tensor) -> torch.Tensor:
            """All tokens for every expert, those of the others times 0; [E * T, D], as the block adds them up."""
            x_ETD = x_ND.view(weights.down_EDI.shape[0], -1, x_ND.shape[-1])
            gates_TE = gates_of_inputs.pop()
            gate_T1, expert_T1 = gates_TE.max(-1, keepdim=True)
            tokens = torch.arange(len(gate_T1), device=x_ND.device)
            watcher.gated(number, gate_T1[:, 0])
            probs_TE = score(logits.pop().to(torch.promote_types(x_ND.dtype, torch.float32)))
            routing = Routing(expert_T1, torch.ones_like(gate_T1), probs_TE, self._source.routed_factor)
            y_ETD = torch.zeros_like(x_ETD)
            y_ETD[0] = watcher.routed(number, x_ETD[expert_T1[:, 0], tokens], routing, weights)
            return y_ETD.view_as(x_ND)

        self._experts.forward = gated_inputs if gates_inputs else experts  # type: ignore[method-assign]
        if self._source.seam == "block":
            assert self._block is not None, "the seam is a block"

            def passed(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                watcher.passed(number, _flat(inputs[0]), _flat(output[0] if isinstance(output, tuple) else output))

            self._hook(self._block, passed)
        self._watch_shared(watcher)

    def _watch_shared(self, watcher: MoeWatcher) -> None:
        if self._place.shared_gate is None:
            return
        outputs: list[torch.Tensor] = []
        self._hook(self._layer.get_submodule(self._place.shared[0].path), lambda _module, _inputs, output: outputs.append(_flat(output)))
        gate = self._layer.get_submodule(self._place.shared_gate.removesuffix(".weight"))

        def gated(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            watcher.shared(self._number, outputs.pop(), torch.sigmoid(_flat(output)))

        self._hook(gate, gated)

    def put(self, ffn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """An FFN, [..., D] to [..., D], in the place of the block, or of the experts in it."""
        if self._source.seam == "block":
            assert self._block is not None, "the seam is a block"
            more = self._source.facts_of_block.returns_more

            def block(x: torch.Tensor, *_arguments: Any, **_more: Any) -> Any:
                y = ffn(x)
                return (y, None) if more else y

            self._block.forward = block  # type: ignore[method-assign]
        else:
            self._experts.forward = lambda x, *_arguments, **_more: ffn(x)  # type: ignore[method-assign]

    def restore(self) -> None:
        """The stock modules, as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in (self._experts, self._block):
            if module is not None:
                vars(module).pop("forward", None)

    def _hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._hooks.append(module.register_forward_hook(hook))


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
