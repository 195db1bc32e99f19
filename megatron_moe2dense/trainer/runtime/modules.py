"""Plain PyTorch modules for Megatron's local layer spec, where the stock ones are missing something.

RMSNorm that takes part in sequence parallelism (the stock WrappedTorchNorm refuses it), and scaled-dot-product attention
(the stock local attention holds the whole score matrix).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_options: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of parameters with this mark over the tensor-parallel group
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape."""
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SdpaCoreAttention(MegatronModule):
    """Causal attention through torch's scaled_dot_product_attention, grouped queries included."""

    def __init__(self, config: TransformerConfig, *_args: Any, softmax_scale: float | None = None, **_options: Any):
        super().__init__(config=config)
        self._scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_options: Any) -> Tensor:
        """query [S, B, heads, d], key and value [S, B, groups, d] to [S, B, heads * d]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
