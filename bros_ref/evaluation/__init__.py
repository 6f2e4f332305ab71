"""Measurements: the paper's evaluation, optimality bounds, the demo, benchmarks."""
