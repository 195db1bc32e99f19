"""Floating-point operations of a step, by model sizes: what MFU and `--dry-run` count."""

from __future__ import annotations

from megatron_moe2dense.families import Dims
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.outline import count_parameters


def forward_flops(spec: ModelSpec, sequence_length: int, active: int | None = None) -> float:
    """FLOPs per token of one forward pass: 2 N + L H (d + v) (S + 1).

    N are the parameters of matrices a token is multiplied with (the LM head, not the embedding, and of the experts the active ones), the
    second term the scores and values of attention over (S + 1) / 2 keys on average, d and v wide. PaLM (Chowdhery et al. 2022), appendix
    B, counts the same but S keys for every token; the causal half is Megatron-LM's convention. Windows shorter than S are not discounted.

    Args:
        sequence_length: S. active: experts per token, when it is not the model's own number.
    """
    dims = spec.dims
    embedding = 0 if dims.tied_embeddings else dims.vocab_size * dims.hidden_size
    matrices = count_parameters(spec, active)[1] - embedding
    return 2.0 * matrices + dims.layers * attention_flops(dims, sequence_length)


def attention_flops(dims: Dims, sequence_length: int) -> float:
    """FLOPs per token of a layer's scores and values; those of latent attention have other widths."""
    return 1.0 * dims.heads * (dims.head_dim + dims.value_dim) * (sequence_length + 1)


def training_flops(student: ModelSpec, teacher: ModelSpec | None, sequence_length: int, active: int | None = None) -> float:
    """FLOPs per token of a training step: three forward passes' worth for the student (its backward pass is two), one for the teacher.

    active: experts per token of the teacher. Recomputed activations are no model FLOPs and are not counted.
    """
    forward = 0.0 if teacher is None else forward_flops(teacher, sequence_length, active)
    return 3 * forward_flops(student, sequence_length) + forward
