"""megatron_moe2dense: turn a trained Mixture-of-Experts language model into a standard dense one.

Shape letters, used as suffixes on tensor names in the whole package:

    T tokens            D hidden size        E routed experts      A experts active per token (top-k)
    K experts kept      G groups             I width of one expert F width of the dense FFN (G*I + shared)
    V vocabulary        L layers             S sequence            B batch
"""

__version__ = "0.1.0"
