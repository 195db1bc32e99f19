"""Offline surgery on checkpoints: calibrate a MoE, score and select experts, convert to a dense model. Never imports the trainer."""
