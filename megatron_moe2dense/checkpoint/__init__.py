"""Hugging Face checkpoints on disk: index, lazy reader, sharded writer, tokenizer assets. No transformers."""
