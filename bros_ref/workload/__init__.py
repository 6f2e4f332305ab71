"""Requests to serve: generated, read from files, or the paper's workloads."""

from bros_ref.workload.generate import (
    ClosedLoopBatches,
    LengthSampler,
    Workload,
    WorkloadError,
    WorkloadItem,
    gamma_arrivals,
    lognormal_lengths,
    merge,
    open_loop,
    poisson_arrivals,
    uniform_lengths,
)

__all__ = [
    "ClosedLoopBatches",
    "LengthSampler",
    "Workload",
    "WorkloadError",
    "WorkloadItem",
    "gamma_arrivals",
    "lognormal_lengths",
    "merge",
    "open_loop",
    "poisson_arrivals",
    "uniform_lengths",
]
