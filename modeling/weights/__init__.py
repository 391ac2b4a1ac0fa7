"""Weights: their files, what these say of themselves, runs and the hub that hold them."""
