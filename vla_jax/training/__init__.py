"""Losses, optimiser, one update, sharding, checkpoints, the training loop."""
