"""Experts of a frozen teacher without Transformer Engine's grouped products: one expert after another, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_moe2dense.trainer.runtime.upstream import own_outputs


class PlainExperts(SequentialMLP):
    """Megatron's sequential experts, whose forward pass without gradients skips what only training and tensor parallelism need.

    Used for whole SwiGLU experts without biases; any other pass is Megatron's own.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        config = self.config
        swiglu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu and not config.add_bias_linear
        clamped = getattr(config, "activation_func_clamp_value", None) is not None
        if config.add_bias_linear:
            own_outputs(expert.linear_fc2 for expert in self.local_experts)  # type: ignore[attr-defined]
        self._plain = swiglu and not clamped and not config.moe_apply_probs_on_input and self.tp_group.size() == 1

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor) -> tuple[Tensor, None]:
        """Rows [T, D] sorted by expert, rows of each expert [E], weights [T] to the weighted outputs [T, D] and no bias."""
        rows_TD, counts_E, weights_T = permuted_local_hidden_states, tokens_per_expert, permuted_probs
        if torch.is_grad_enabled() or not self._plain:
            return super().forward(rows_TD, counts_E, weights_T)
        counts, outputs_TD = counts_E.tolist(), torch.empty_like(rows_TD)
        parts = zip(rows_TD.split(counts), weights_T[:, None].split(counts), outputs_TD.split(counts), strict=True)
        experts: Any = self.local_experts
        for expert, (rows, weights, outputs) in zip(experts, parts, strict=True):
            if not len(rows):
                continue  # of a teacher in FP8 the weights would be made for nothing
            gate, up = torch.mm(rows, expert.linear_fc1.weight.t()).chunk(2, dim=-1)
            torch.mm(torch.nn.functional.silu(gate).mul_(up).mul_(weights), expert.linear_fc2.weight.t(), out=outputs)
        return outputs_TD, None
