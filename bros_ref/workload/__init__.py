"""Requests to serve: generated, read from files, the paper's."""

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
