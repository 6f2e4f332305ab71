"""Workloads on which nothing was tuned: synthetic long prompts, and every trace in a folder.

Each is served at two loads together with the paper's best-effort batches. The same rules choose the rest for all:

    system    the first of `SYSTEMS` whose context holds `FITTING` of the requests; longer requests are left out
    rate      such that RT alone takes LOADS of the GPU's time (`rt_work_share`); the trace's own rate is ignored
    targets   TTFT: 1.25 times what a prompt of the 99th percentile takes alone, and at least the paper's 0.4 s.
              TPOT: the paper's 0.2 s, so that a full step of chunks fits

A file with arrival times is replayed in windows, one for each seed. Lengths without arrival times get Poisson arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bros_ref.evaluation.optimality import rt_work_share
from bros_ref.request import SLO, RequestClass
from bros_ref.simulator.cost_model import model_named
from bros_ref.simulator.runner import fit_to
from bros_ref.simulator.simulate import SimulationSettings
from bros_ref.workload.files import has_arrivals, read_lengths, read_workload
from bros_ref.workload.generate import MAX_TOKENS, WorkloadItem
from bros_ref.workload.paper import LONG_LENGTHS, MAX_BE_BATCH, PAPER_SLO, PaperWorkload, be_batch_for

SYSTEMS = (SimulationSettings("a100-40gb", "opt-13b", 2), SimulationSettings("a100-40gb", "llama-3-8b", 1),
           SimulationSettings("h100-80gb", "qwen3-32b", 2))
FITTING = 0.95
LOADS = {"half load": 0.5, "high load": 0.9}
TTFT_SHARE = 1.25
SAMPLE_S = 2000.0  # length of the sample of Poisson arrivals, at one per second, that gives load and targets

Point = tuple[str, SimulationSettings, PaperWorkload]


def unseen_points(duration_s: float, folder: Path | None = None) -> list[Point]:
    """(label, settings, workload) of every point: the synthetic ones, and those of a folder's files.

    Raises:
        WorkloadError: a file can be read neither as a trace nor as lengths.
        ValueError: the folder has no files, or fewer than two real-time requests of a trace fit.
    """
    one_per_s = PaperWorkload(1.0, duration_s, 0)
    points = [point for name in LONG_LENGTHS for point in _at_loads(
        name, SYSTEMS[-1], replace(one_per_s, rt_lengths=name))]
    if folder is None:
        return points
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{folder} is no folder with files in it; expected traces or lengths, as CSV or JSONL")
    for path in paths:
        if has_arrivals(path):
            read = [item for item in read_workload(path, RequestClass.REAL_TIME, PAPER_SLO) if item.slo is not None]
            settings = _system([item.prompt_tokens + item.output_tokens for item in read])
            most = model_named(settings.model).max_context_tokens
            workload = replace(one_per_s, rt_trace=_fitting(read, most, path))
        else:
            settings = _system([sum(pair) for pair in read_lengths(path, 2 * MAX_TOKENS)])
            workload = replace(one_per_s, rt_lengths=read_lengths(path, model_named(settings.model).max_context_tokens))
        points += _at_loads(path.name.partition(".")[0], settings, workload)
    return points


def _system(totals: list[int]) -> SimulationSettings:
    """The first system whose context fits most of the requests. `totals`: tokens of each request."""
    for settings in SYSTEMS:
        most = model_named(settings.model).max_context_tokens
        if sum(total <= most for total in totals) >= FITTING * len(totals):
            return settings
    return SYSTEMS[-1]


def _fitting(items: list[WorkloadItem], most: int, path: Path) -> tuple[WorkloadItem, ...]:
    kept = [item for item in items if item.prompt_tokens + item.output_tokens <= most]
    if len(kept) < 2:
        raise ValueError(f"{path}: {len(kept)} real-time requests of at most {most} tokens; expected two or more")
    return tuple(replace(item, arrival_s=item.arrival_s - kept[0].arrival_s) for item in kept)


def _at_loads(name: str, settings: SimulationSettings, workload: PaperWorkload) -> Iterable[Point]:
    """A workload of one request per second, rescaled to each load, with its targets and best-effort batch."""
    whole_s = len(workload.rt_trace) + 1.0 if workload.rt_trace else SAMPLE_S
    sample = replace(workload, duration_s=whole_s)
    prompts = [item.prompt_tokens for item in sample.build(0, only="rt").due(math.inf)]
    latency, work_s = fit_to(settings.cost), rt_work_share(settings, sample) * whole_s / len(prompts)
    alone_s = latency.c0 + latency.cost_s(int(np.quantile(prompts, 0.99)), 0)
    slo = SLO(max(PAPER_SLO.ttft_s, round(TTFT_SHARE * alone_s, 2)), PAPER_SLO.tpot_s)
    batch = min(MAX_BE_BATCH, be_batch_for(settings.num_blocks * settings.block_size))
    for load, wanted in LOADS.items():
        yield f"{name}/{load}", settings, replace(
            workload, rt_rate_per_s=wanted / work_s, be_batch=batch, slo=slo)
