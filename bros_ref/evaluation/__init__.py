"""Measuring: the paper's evaluation, bounds, the demo, benchmarks."""
