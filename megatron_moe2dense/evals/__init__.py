"""Evaluation of Hugging Face directories through stock transformers: perplexity, KL to a teacher, lm-eval accuracy."""
