"""What each axis of a dense decoder's tensors counts, so that all of them can be cut to a smaller shape together."""

from __future__ import annotations

from collections.abc import Mapping

_LAYER, _ATTENTION = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
_FFN = {f"{_LAYER}mlp.{name}_proj.weight": axes for name, axes in {"gate": "FD", "up": "FD", "down": "DF"}.items()}
_BIASES = {"q": "Q", "k": "K", "v": "K", "o": "D"}


def decoder_axes(biases: str = "", qk_norm: bool = False) -> Mapping[str, str]:
    """Name templates of a decoder with grouped-query attention and gated FFNs, with one letter an axis.

    V vocabulary, D hidden channels, F neurons of the FFN, Q query heads times head_dim, K key (or value) heads times head_dim,
    H head_dim.

    Args:
        biases: of which of the projections q, k, v, o a checkpoint may hold biases. qk_norm: a norm of each query and key head.
    """
    trunk = {"model.embed_tokens.weight": "VD", "lm_head.weight": "VD", "model.norm.weight": "D"}
    norms = {f"{_LAYER}{name}.weight": "D" for name in ("input_layernorm", "post_attention_layernorm")}
    attention = {f"{_ATTENTION}{name}_proj.weight": axes for name, axes in {"q": "QD", "k": "KD", "v": "KD", "o": "DQ"}.items()}
    attention |= {f"{_ATTENTION}{name}_proj.bias": _BIASES[name] for name in biases}
    attention |= {f"{_ATTENTION}{name}_norm.weight": "H" for name in "qk" if qk_norm}
    return {**trunk, **norms, **attention, **_FFN}
