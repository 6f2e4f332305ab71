"""The cost of simulating: CPU seconds and request-steps per second on the paper's OPT-13B setting, and the memory for a
trace file as long as published ones."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bros_ref.evaluation.bench.memory import PeakMemory
from bros_ref.request import RequestClass
from bros_ref.simulator.simulate import Arrivals, SimulationSettings, run
from bros_ref.workload.files import read_workload
from bros_ref.workload.paper import PAPER_SLO, PaperWorkload, be_batch_for

FILE_RATE_PER_S = 8.0
FILE_SETTINGS = SimulationSettings("a100-80gb", "llama-3-8b", 1)


def bench_simulator(policies: Sequence[str], duration_s: float, rt_rate: float, seed: int, file_requests: int = 0,
                    on_row: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    """One row per policy, and one more for a file of `file_requests` requests if there are to be any. A request-step is
    one request scheduled in one step; CPU time is that of one core, summary included."""
    settings = SimulationSettings(seed=seed)
    arrivals = PaperWorkload(rt_rate, duration_s, be_batch_for(settings.num_blocks * settings.block_size))
    rows = []
    for policy in policies:
        rows.append(_row(policy, settings, arrivals))
        if on_row is not None:
            on_row()
    if file_requests:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # so that the peak is this run's own
            rows += [fresh.submit(_file_row, policy, file_requests, seed).result() for policy in policies[-1:]]
    return rows


def _row(policy: str, settings: SimulationSettings, arrivals: Arrivals) -> dict[str, Any]:
    with PeakMemory() as peak:
        start_s = time.process_time()
        summary, _ = run(policy, settings, arrivals)
        cpu_s = time.process_time() - start_s
    request_steps = summary["scheduler"]["request_steps"]
    return {"policy": policy, "model": settings.model, "gpu": f"{settings.tp} x {settings.gpu}",
            "simulated_s": summary["duration_s"], "cpu_s": cpu_s, "request_steps": request_steps,
            "request_steps_per_s": request_steps / cpu_s, "requests": sum(
                counted["arrived"] for counted in summary["classes"].values()),
            "peak_rss_bytes": peak.bytes}


def _file_row(policy: str, num_requests: int, seed: int) -> dict[str, Any]:
    """Writes a file in the Azure trace's format, reads it and simulates it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.csv"
        write_azure_like(path, num_requests, seed)
        arrivals = tuple(read_workload(path, RequestClass.REAL_TIME, PAPER_SLO))
    return _row(policy, FILE_SETTINGS, arrivals)


def write_azure_like(path: Path, num_requests: int, seed: int) -> None:
    """A synthetic trace with the columns of the Azure LLM inference trace: Poisson arrivals, log-normal lengths."""
    rng = np.random.default_rng(seed)
    times = np.datetime64("2023-11-16T18:00:00.000000") + np.cumsum(
        rng.exponential(1e6 / FILE_RATE_PER_S, num_requests)).astype("timedelta64[us]")
    prompts = np.clip(rng.lognormal(6.5, 1.0, num_requests), 1, 4000).astype(int)
    outputs = np.clip(rng.lognormal(2.8, 0.9, num_requests), 1, 400).astype(int)
    lines = (f"{str(moment).replace('T', ' ')},{prompt},{output}\n"
             for moment, prompt, output in zip(times, prompts, outputs, strict=True))
    with path.open("w", encoding="utf-8") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        file.writelines(lines)
