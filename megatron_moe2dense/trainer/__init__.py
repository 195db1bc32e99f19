"""Distillation: a Megatron-Core student trained on the logits of a frozen, co-located teacher. Only here is megatron imported."""
