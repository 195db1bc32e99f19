"""What is deployed: checkpoints as engines load them, and whether an engine computes what stock transformers does."""
