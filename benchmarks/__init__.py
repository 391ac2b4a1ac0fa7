"""What is measured, how, and the figures (`benchmarks/README.md`)."""
