"""The live hybrid run under KV pressure: every policy serves the same workload on the same model and pool.

The workload is the one on which vLLM's CPU backend was measured for comparison: 16 BE requests of 512 + 128 tokens at
t = 0 and 12 RT requests of 64 + 32 over 20 s, 8 sequences at most, 3,200 KV tokens. The token budget of a step, 128
for every policy, keeps an iteration near half a second on two slow cores. Policies alternate over rounds;
`rt-only` is the latency floor, `be-only` the throughput ceiling. Wall clock, real model.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bros_ref.engine.build import LiveSettings, LoadedModel, make_engine, make_runner, request_from_item
from bros_ref.engine.profile import fit_latency_model
from bros_ref.engine.serve import keep_class, serve
from bros_ref.request import SLO, RequestClass
from bros_ref.trace.metrics import summarise
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import Workload, WorkloadItem, merge

ALL = ("rt-only", "be-only", "vllm-fcfs", "vllm-priority", "tgi", "sglang-priority", "bros-rr", "bros-recompute",
       "bros-swap-request", "bros-swap-block", "bros")
SETTINGS = LiveSettings(kv_blocks=200, max_num_seqs=8, max_num_batched_tokens=128, chunked_prefill=True)


def hybrid_items(seed: int, slo: SLO, num_be: int = 16, num_rt: int = 12, over_s: float = 20.0) -> list[WorkloadItem]:
    """The workload of the module's docstring."""
    rng = np.random.default_rng(seed)
    be = [WorkloadItem(0.0, RequestClass.BEST_EFFORT, 512, 128) for _ in range(num_be)]
    times = np.sort(rng.uniform(0, over_s, num_rt))  # Poisson arrivals, given that there are `num_rt` of them
    rt = [WorkloadItem(float(time_s), RequestClass.REAL_TIME, 64, 32, slo) for time_s in times]
    return merge(be, rt)


def bench_hybrid(loaded: LoadedModel, policies: Sequence[str] = ALL, slo: SLO | None = None, rounds: int = 1,
                 seed: int = 0, settings: LiveSettings = SETTINGS, items: list[WorkloadItem] | None = None,
                 refit: bool = False, on_run: Callable[[str, int], None] | None = None,
                 ) -> tuple[list[dict[str, Any]], list[Trace]]:
    """Serves the workload once a policy and round. Returns the median run (by RT median TTFT, else by duration) of
    each policy as `metrics.summarise` gives it, and its trace."""
    runner = make_runner(loaded, settings)
    latency = fit_latency_model(runner, settings.max_num_seqs, loaded.name, refit=refit)
    items = hybrid_items(seed, slo or SLO(0.6, 0.4)) if items is None else items
    runs: dict[str, list[tuple[dict[str, Any], Trace]]] = {policy: [] for policy in policies}
    for round_ in range(rounds):
        for policy in policies:
            if on_run is not None:
                on_run(policy, round_)
            engine = make_engine(policy, loaded, runner, settings, copy.deepcopy(latency))
            serve(engine, Workload(keep_class(items, policy)), lambda item: request_from_item(item, loaded, seed))
            assert engine.trace is not None
            runs[policy].append((summarise(engine.trace), engine.trace))
    chosen = [_median_run(runs[policy]) for policy in policies]
    return [summary for summary, _ in chosen], [trace for _, trace in chosen]


def _median_run(runs: list[tuple[dict[str, Any], Trace]]) -> tuple[dict[str, Any], Trace]:
    def key(run: tuple[dict[str, Any], Trace]) -> float:
        ttft = run[0]["classes"]["rt"]["median_ttft_ms"]
        return float(run[0]["duration_s"] if ttft is None else ttft)

    middle = statistics.median_low([key(run) for run in runs])
    return next(run for run in runs if key(run) == middle)
