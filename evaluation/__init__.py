"""Metrics of reconstructions and of generated images."""
