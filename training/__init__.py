"""Pieces that both trainers share: runtime, checkpoints, learning rates, randomness, logs."""
