"""Distillation: a Megatron-Core student trained on the logits of a frozen, co-located teacher. Only here is megatron imported."""

from megatron_moe2dense.trainer import without_triton

without_triton.install()
