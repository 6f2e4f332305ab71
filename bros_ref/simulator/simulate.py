"""Simulated runs: the live system's scheduler, KV accounting and engine on a virtual clock and a GPU cost model.

Assembly only. A run is a function of its settings, its workload and its seed, so runs spread over processes, and the
same run twice gives the same numbers (but for `schedule_s`, which is this machine's own CPU time).
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, overload

from bros_ref.clock import VirtualClock
from bros_ref.config import HOST_BLOCKS_PER_BLOCK, KVCacheConfig
from bros_ref.engine.assemble import RunnerFacts, assemble_engine
from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.engine.serve import keep_class, serve
from bros_ref.request import Request, SamplingParams
from bros_ref.scheduler import REFERENCE_FORMS, REFERENCE_POLICIES
from bros_ref.simulator.cost_model import CostModel, gpu_named, model_named
from bros_ref.simulator.runner import SimulatedRunner, fit_to
from bros_ref.trace.metrics import StreamedTrace, summarise
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import Workload, WorkloadItem
from bros_ref.workload.paper import PaperWorkload

HOST_STORE_BYTES = 512e9  # of host memory for checkpoints: an assumption, half of what servers with such GPUs have
MAX_TAIL_S = 210.0  # the longest answer, 1,024 tokens, at the paper's TPOT: none is missed for the end of the run
Arrivals = PaperWorkload | tuple[WorkloadItem, ...]


@dataclass(frozen=True)
class SimulationSettings:
    """What is simulated. `kv_tokens` None: what fits the GPUs' memory. `chunked_prefill` None: the
    policy's own default, off for BROS (paper). `rt_slowdown`: see `SchedulerConfig`.

    Raises:
        ValueError: an unknown GPU or model, a model that does not fit, a pool below one block.
    """

    gpu: str = "a100-40gb"
    model: str = "opt-13b"
    tp: int = 2
    kv_tokens: int | None = None
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    chunked_prefill: bool | None = None
    seed: int = 0
    rt_slowdown: float | None = None

    @property
    def cost(self) -> CostModel:
        return CostModel(gpu_named(self.gpu), model_named(self.model), self.tp)

    @property
    def basis(self) -> str:
        """Where the step times come from, to be shown in every title."""
        gpu = gpu_named(self.gpu)
        return ("operator times fitted on this GPU" if gpu.measured else "operator times scaled from the nearest "
                "measured GPU") + (", tensor parallelism modelled" if self.tp > 1 else "")

    @property
    def num_blocks(self) -> int:
        tokens = self.cost.kv_tokens if self.kv_tokens is None else self.kv_tokens
        if tokens < self.block_size:
            raise ValueError(f"a KV pool of {tokens} tokens holds no block of {self.block_size}; ask for more of them")
        return tokens // self.block_size

    @property
    def kv_config(self) -> KVCacheConfig:
        """The pool, and a host store of HOST_BLOCKS_PER_BLOCK times its size within HOST_STORE_BYTES."""
        most = int(HOST_STORE_BYTES // (self.cost.model.kv_bytes_per_token * self.block_size))
        return KVCacheConfig(self.num_blocks, self.block_size, min(HOST_BLOCKS_PER_BLOCK * self.num_blocks, most))


def simulated_engine(policy: str, settings: SimulationSettings, *, keep_steps: bool = False) -> LLMEngine:
    """An engine on a virtual clock. `keep_steps`: record a full trace for reports; otherwise only measure."""
    cost, clock = settings.cost, VirtualClock()
    facts = RunnerFacts(settings.model, f"{settings.tp} x {settings.gpu} (simulated)", cost.model.kv_bytes_per_token,
                        cost.model.max_context_tokens)
    return assemble_engine(policy, SimulatedRunner(cost, clock), facts, settings.kv_config, settings, clock,
                           latency=fit_to(cost), trace_type=Trace if keep_steps else StreamedTrace)


class Zeros(Sequence[int]):
    """A prompt of which only the length matters. It takes no memory, so a hundred thousand can wait at once."""

    __slots__ = ("_length",)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        within = range(self._length)[index]  # raises IndexError as a list does
        return 0 if isinstance(within, int) else Zeros(len(within))


def request_of_length(item: WorkloadItem) -> Request:
    """A request whose tokens are all 0: only the lengths matter."""
    return Request(item.request_id, item.request_class, Zeros(item.prompt_tokens),
                   SamplingParams(max_tokens=item.output_tokens, ignore_eos=True), item.arrival_s, item.slo)


def run(policy: str, settings: SimulationSettings, arrivals: Arrivals, until_s: float = math.inf, *,
        keep_steps: bool = False) -> tuple[dict[str, Any], Trace]:
    """One policy on one workload. Returns the summary and the trace.

    A recipe's arrivals end at its duration. The run goes on, with the best-effort backlog, until the last RT request
    has ended, at most MAX_TAIL_S longer, so that requests of the last seconds do not count as missed. Throughputs are
    those until the duration: the tail is short under a policy that serves RT soon, long under one that serves it late,
    and full of best-effort work in either case.

    `rt-only` and `be-only` are run in both forms of BROS, and the better run is returned: a floor, and a ceiling.
    """
    if policy in REFERENCE_POLICIES:
        return min((_run(policy, form, settings, arrivals, until_s, keep_steps) for form in REFERENCE_FORMS),
                   key=lambda result: reference_rank(result[0]))
    return _run(policy, policy, settings, arrivals, until_s, keep_steps)


def reference_rank(summary: dict[str, Any]) -> tuple[float, float]:
    """Of two runs of `rt-only` or of `be-only`, the one with the smaller rank is the reference: more RT on time, then
    lower RT latency; or more BE tokens/s."""
    rt, be = summary["classes"]["rt"], summary["classes"]["be"]
    if summary["policy"] == "be-only":
        return -be["output_throughput"], 0.0
    return -(rt["slo_attainment"] or 0.0), rt["normalized_latency_ms_per_token"] or math.inf


def _run(policy: str, form: str, settings: SimulationSettings, arrivals: Arrivals, until_s: float,
         keep_steps: bool) -> tuple[dict[str, Any], Trace]:
    engine = simulated_engine(form, settings, keep_steps=keep_steps)
    assert engine.trace is not None
    engine.trace.policy = policy
    if isinstance(arrivals, PaperWorkload):
        until_s = min(until_s, arrivals.duration_s)
        workload = arrivals.build(settings.seed, only=REFERENCE_POLICIES.get(policy))
    else:
        workload = Workload(keep_class(list(arrivals), policy))
    serve(engine, workload, request_of_length, until_s)
    while (isinstance(arrivals, PaperWorkload) and engine.clock.now_s() < until_s + MAX_TAIL_S
           and any(request.is_rt for request in engine.scheduler.requests.values())):
        serve(engine, workload, request_of_length, engine.clock.now_s() + 1.0)
    return summarise(engine.trace, until_s), engine.trace


@dataclass(frozen=True)
class Job:
    """One run of a sweep; `name` identifies it."""

    name: str
    policy: str
    settings: SimulationSettings
    arrivals: Arrivals


def _summary(job: Job) -> dict[str, Any]:
    return run(job.policy, job.settings, job.arrivals)[0]


def run_all(jobs: Sequence[Job], processes: int = 0, on_done: Callable[[Job], None] | None = None,
            ) -> list[dict[str, Any]]:
    """Runs every job, in parallel where there are several; summaries in the order of the jobs.

    Args:
        processes: the most worker processes; 0: one per core.
    """
    workers = min(len(jobs), processes or os.cpu_count() or 1)
    results: list[dict[str, Any]] = [{}] * len(jobs)
    for index, summary in _results(jobs, workers):
        results[index] = summary
        if on_done is not None:
            on_done(jobs[index])
    return results


def _results(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if workers <= 1:
        yield from ((index, _summary(job)) for index, job in enumerate(jobs))
        return
    with ProcessPoolExecutor(workers, initializer=_end_by_interrupt) as pool:
        futures = {pool.submit(_summary, job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # after a failure or Ctrl-C, runs that have not begun are of no use
            pool.shutdown(wait=False, cancel_futures=True)


def _end_by_interrupt() -> None:
    """Ctrl-C ends a worker at once; Python's own handler would end its run and let it begin the next."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
