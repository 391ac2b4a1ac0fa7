"""Studies over the real commands."""
