"""Plain PyTorch modules for Megatron's layer specs, where the stock ones are missing something.

RMSNorm that takes part in sequence parallelism (the stock WrappedTorchNorm refuses it), one over all heads of all
tensor-parallel ranks, and scaled-dot-product attention (the stock local attention holds the whole score matrix).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_moe2dense.trainer.runtime import context


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


class HeadsRMSNorm(torch.nn.Module):
    """Root-mean-square norm over all heads together, which tensor parallelism spreads over its ranks.

    Every rank has its heads' part of the weight; the sum of squares goes over the group, and so does its gradient.

    Args:
        heads: of the whole model. hidden_size: of one head.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self._width = eps, heads * hidden_size
        size = self._width // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        _split_over_tensor_ranks(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [S, B, heads of this rank, head] to the same shape."""
        wide = x.float()
        # The all-reduce's backward is the identity, the copy's is an all-reduce.
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(wide.pow(2).sum((-2, -1), keepdim=True)))
        normed = wide * torch.rsqrt(squares / self._width + self.eps)
        return self.weight.view(x.shape[-2:]) * normed.to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """For Megatron's distributed checkpoints."""
        return _sharded(self, {"weight": 0}, (prefix, sharded_offsets), metadata)


class HeadsNormedAttention(SelfAttention):
    """SelfAttention whose queries and keys are normalised over all heads. It makes the norms itself, since Megatron's `qk_layernorm`,
    without which 0.19 takes none from the layer spec, would sum their gradients over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any):
        super().__init__(config, *arguments, **options)
        width, eps = self.hidden_size_per_attention_head, config.layernorm_epsilon
        assert config.num_query_groups is not None
        norms: Any = self
        norms.q_layernorm = HeadsRMSNorm(config, width, config.num_attention_heads, eps)
        norms.k_layernorm = HeadsRMSNorm(config, width, config.num_query_groups, eps)


class SdpaCoreAttention(MegatronModule):
    """Causal attention through torch's scaled_dot_product_attention: grouped queries, sliding windows, learned sinks.

    Under context parallelism keys and values are gathered over the ranks; the scores of a rank are [S / C, S].
    `softmax_offset` [heads of this rank] is named and shaped as in Megatron's own attention and Transformer Engine's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_args: Any,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_options: Any,
    ):
        super().__init__(config=config)
        self._scale = softmax_scale
        self._context_group = pg_collection.cp if pg_collection is not None else None
        assert config.context_parallel_size == 1 or self._context_group is not None
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)  # type: ignore[arg-type]
        self._window = config.window_size[0] + 1 if slides and config.window_size else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_options: Any) -> Tensor:
        """query [S, B, heads, d], key and value [S, B, groups, d] to [S, B, heads * d]."""
        mask = self._mask(query.shape[0], query.device)
        if self._context_group is not None and self.config.context_parallel_size > 1:
            key, value = (context.gather_sequence(tensor, self._context_group) for tensor in (key, value))
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        scale = self._scale if self._scale is not None else q.shape[-1] ** -0.5
        if self.softmax_offset is not None:
            assert mask is not None
            out = _attention_with_sinks((q, k, v), self.softmax_offset, mask, scale)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        """[queries, keys] of this rank, None where the kernel's own causal mask serves."""
        if self._context_group is not None and self.config.context_parallel_size > 1:
            return causal_mask(context.positions(length, self._context_group, device), self._window)
        positions_S = torch.arange(length, device=device)
        plain = self._window is None and self.softmax_offset is None
        return None if plain else causal_mask((positions_S, positions_S), self._window)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """For Megatron's distributed checkpoints."""
        return _sharded(self, {"softmax_offset": 0}, (prefix, sharded_offsets), metadata)


@torch.no_grad()
def prepare_sinks(model: torch.nn.Module) -> None:
    """Zero the attention sinks and mark them as split; Transformer Engine's own attention does neither."""
    for name, parameter in model.named_parameters():
        if name.endswith("core_attention.softmax_offset"):
            parameter.zero_()
            _split_over_tensor_ranks(parameter)


def causal_mask(positions: tuple[Tensor, Tensor], window: int | None) -> Tensor:
    """Positions of Q queries and K keys to [Q, K], True where a query sees a key: itself and earlier ones, `window` of them in all."""
    queries_Q, keys_K = positions
    distance = queries_Q[:, None] - keys_K[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attention_with_sinks(qkv: tuple[Tensor, Tensor, Tensor], sinks_H: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax over the keys and one more logit a head, which takes part of the probability and has no value.

    The logit becomes a key of its own, in an added channel where queries are 1 and other keys 0, so that the fused kernel and its
    gradients serve. q [B, H, Q, d], k and v [B, groups, K, d], mask [Q, K] to [B, H, Q, d].
    """
    q, k, v = qkv
    batch, heads, _, channels = q.shape
    k, v = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (k, v))
    sink = torch.nn.functional.pad((sinks_H / scale).to(k.dtype).view(1, heads, 1, 1), (channels, 0)).expand(batch, -1, -1, -1)
    q = torch.nn.functional.pad(q, (0, 1), value=1.0)
    k = torch.cat((torch.nn.functional.pad(k, (0, 1)), sink), dim=2)
    v = torch.nn.functional.pad(v, (0, 1, 0, 1))
    mask = torch.nn.functional.pad(mask, (0, 1), value=True)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :channels]


def _split_over_tensor_ranks(parameter: Tensor) -> None:
    """Mark a parameter of which every tensor-parallel rank has its own part: counted on each in the gradient norm."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = 0  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def _sharded(module: torch.nn.Module, axes: dict[str, int], place: tuple[str, tuple], metadata: Any) -> dict[str, Any]:
    prefix, offsets = place
    group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
    own = module.state_dict(prefix="", keep_vars=True)
    tensor_group: Any = get_tensor_model_parallel_group_if_none(None)
    return make_sharded_tensors_for_checkpoint(own, prefix, axes, offsets, tp_group=tensor_group, dp_cp_group=group)
