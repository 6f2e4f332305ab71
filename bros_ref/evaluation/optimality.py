"""How far from optimal? Two answers by integer programming (HiGHS, through scipy), and one by arithmetic.

    recorded_gaps         one iteration: greedy packing against the exact 0/1 optimum, over recorded states
    small_instance_gaps   whole runs: the policy against a clairvoyant that knows arrivals and lengths, tiny instances
    rt_work_share         whole runs: what serving RT leaves of the BE-only ceiling

The first two take the RT side as given (they must be served, or served on time) and maximise best-effort work, which
is the paper's formulation. Optimal iterations need not make an optimal run: the most tokens now may be the wrong
tokens. The second answer says how much that matters, for instances small enough to solve.

The optimum of an iteration is exact for the program that is solved, which omits some cases. It excludes BE with KV on
the host (what they need depends on which blocks are empty by then) and all newcomers but the first MAX_NEWCOMERS;
states in which KV is copied or a request is preempted are not solved. How often either happened is reported beside the
result, as "omitted".
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from bros_ref.clock import VirtualClock
from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.engine.serve import serve
from bros_ref.request import SLO, RequestClass, RequestStatus
from bros_ref.scheduler import make_scheduler
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.scheduler.output import SchedulerOutput
from bros_ref.simulator.runner import SimulatedRunner, fit_to
from bros_ref.simulator.simulate import SimulationSettings, request_of_length, simulated_engine
from bros_ref.trace.metrics import request_timings
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import Workload, WorkloadItem
from bros_ref.workload.paper import PaperWorkload

MAX_NEWCOMERS = 32  # waiting BE offered to the exact program, in their order

# -- one iteration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A BE request that could run: its tokens, its cost in seconds, the empty blocks it needs."""

    tokens: int
    cost_s: float
    blocks: int


@dataclass(frozen=True)
class PackingProblem:
    """Which BE to add to the RT of an iteration: at most `seats`, `blocks`, `tokens`, and `spare_s` seconds."""

    candidates: tuple[Candidate, ...]
    seats: int
    blocks: int
    tokens: int
    spare_s: float


def solve_packing(problem: PackingProblem) -> int:
    """The most BE tokens that fit, exactly."""
    usable = [c for c in problem.candidates if c.cost_s <= problem.spare_s and c.blocks <= problem.blocks]
    if not usable or problem.seats <= 0:
        return 0
    limits = [problem.seats, problem.blocks, problem.tokens, min(problem.spare_s, 1e6)]
    totals = [len(usable), *(sum(column) for column in zip(*((c.blocks, c.tokens, c.cost_s) for c in usable),
                                                           strict=True))]
    if all(total <= limit for total, limit in zip(totals, limits, strict=True)):
        return int(totals[2])  # nothing has to be left out: no program needed
    rows = np.array([[1.0] * len(usable), [c.blocks for c in usable], [c.tokens for c in usable],
                     [c.cost_s for c in usable]])
    scale = np.maximum(rows.max(axis=1), 1e-12)
    with _silent_stdout():
        result = milp(-rows[2], constraints=LinearConstraint(rows / scale[:, None], ub=np.array(limits) / scale),
                      integrality=np.ones(len(usable)), bounds=Bounds(0, 1))
    best: int = round(-result.fun)
    return best


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS prints debugging lines past Python, whatever its options say; standard output may carry JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C still holds back goes nowhere too
        os.dup2(kept, 1)
        os.close(kept)


def iteration_gaps(settings: SimulationSettings, arrivals: PaperWorkload) -> list[float]:
    """The ratios of `recorded_gaps`."""
    return recorded_gaps(settings, arrivals)[0]


def recorded_gaps(settings: SimulationSettings, arrivals: PaperWorkload) -> tuple[list[float], Counter[str]]:
    """Runs BROS and, at every iteration without a preemption, compares its BE tokens with the optimum.

    Returns:
        greedy / optimum of each such state, 1.0 is optimal; and what the program did not see: states with copies or a
        preemption ("states_with_copies", "states_with_preemption"), which were not solved, and of the solved ones
        those in which a BE with KV on the host or a newcomer beyond MAX_NEWCOMERS was not offered
        ("states_with_offloaded_be", "states_with_more_newcomers").
    """
    engine = simulated_engine("bros", settings)
    recorder = _Recorder(engine.scheduler)
    engine.scheduler.schedule = recorder.schedule  # type: ignore[method-assign]  # observes, and changes nothing
    serve(engine, arrivals.build(settings.seed), request_of_length, arrivals.duration_s)
    return [greedy / optimum for greedy, optimum in recorder.results], recorder.omitted


def distribution(ratios: Sequence[float]) -> dict[str, Any]:
    """Of greedy / optimum: "states", "mean", "p1", "p5", "p25", "p50", "share_optimal", and "histogram", how many lie
    in each tenth from 0 to 1 (the optimal ones in the last)."""
    values = np.array(ratios)
    if not len(values):
        return {"states": 0, "mean": None, "share_optimal": None, "histogram": [0] * 10} | dict.fromkeys(
            ("p1", "p5", "p25", "p50"))
    return {"states": len(values), "mean": float(values.mean()), "share_optimal": float((values > 1 - 1e-9).mean()),
            "histogram": np.histogram(values, bins=10, range=(0, 1))[0].tolist()} | {
                f"p{percent}": float(np.percentile(values, percent)) for percent in (1, 5, 25, 50)}


class _Recorder:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._decide = scheduler, scheduler.schedule
        self.results: list[tuple[int, int]] = []
        self.omitted: Counter[str] = Counter()

    def schedule(self, now_s: float) -> SchedulerOutput:
        free, (before, not_offered) = self._scheduler.kv.num_free_blocks, self._candidates()
        output = self._decide(now_s)
        changes = output.kv_changes
        if changes.copies or output.preempted:
            self.omitted["states_with_preemption" if output.preempted else "states_with_copies"] += 1
            return output
        if not before:
            return output
        rt = [index for index, request in enumerate(output.requests) if request.is_rt]
        rt_ids = {output.requests[index].request_id for index in rt}
        taken = sum(1 for request_id, _, block_id in changes.block_changes if request_id in rt_ids and block_id != -1)
        greedy = sum(output.num_scheduled_tokens) - sum(output.num_scheduled_tokens[index] for index in rt)
        rt_tokens = sum(output.num_scheduled_tokens) - greedy
        latency = self._scheduler.latency
        step_budget_s = math.inf if output.step_budget_s is None else output.step_budget_s
        spent_s = latency.c0 + sum(latency.cost_s(output.num_scheduled_tokens[index],
                                                  output.requests[index].num_computed_tokens) for index in rt)
        optimum = solve_packing(PackingProblem(
            tuple(before), self._scheduler.max_batch_size - len(rt), free - taken,
            self._scheduler.config.max_num_batched_tokens - rt_tokens, step_budget_s / latency.safety - spent_s))
        if optimum and greedy <= optimum:  # a due BE may exceed what the deadlines allow: no basis for a comparison
            self.results.append((greedy, optimum))
            self.omitted.update(not_offered)
        return output

    def _candidates(self) -> tuple[list[Candidate], set[str]]:
        """The BE that the program may choose from, and those that it does not see."""
        kv, latency = self._scheduler.kv, self._scheduler.latency
        newcomers, not_offered = 0, set()
        found: list[Candidate] = []
        for request in self._scheduler.requests.values():
            if request.is_rt:
                continue
            if request.status is RequestStatus.WAITING:
                newcomers += 1
                if newcomers > MAX_NEWCOMERS:
                    not_offered.add("states_with_more_newcomers")
                    continue
            if request.request_id in kv.offloaded_tokens:
                not_offered.add("states_with_offloaded_be")
                continue
            tokens, context = request.num_tokens - request.num_computed_tokens, request.num_computed_tokens
            found.append(Candidate(tokens, latency.cost_s(tokens, context),
                                   kv.blocks_for(request.num_tokens) - len(kv.block_table(request.request_id))))
        return found, not_offered


# -- what RT work leaves ----------------------------------------------------------------------------------------------


def rt_work_share(settings: SimulationSettings, arrivals: PaperWorkload) -> float:
    """The share of the GPU's time that the RT tokens take if each costs what it adds to an iteration (the scheduler's
    offline model), the fixed part of an iteration being BE's.

    The BE-only ceiling times one less this is what BE can have when RT is served: an estimate, not a strict
    bound, because the model is linear, and a token that joins a small batch costs less.
    """
    latency, seconds = fit_to(settings.cost), 0.0
    for item in arrivals.build(settings.seed, only="rt").due(arrivals.duration_s):
        decodes = item.output_tokens - 1
        contexts = decodes * item.prompt_tokens + decodes * (decodes + 1) / 2
        seconds += latency.cost_s(item.prompt_tokens, 0) + latency.c1 * decodes + latency.c3 * contexts
    return seconds / arrivals.duration_s


# -- a whole run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearCost:
    """A step of n tokens takes base_s + n * token_s, and copies are free, as an integer program can express it."""

    base_s: float = 0.02
    token_s: float = 0.001

    def step_s(self, new_tokens: int, num_decodes: int, prefill_products: float, decode_contexts: int) -> float:
        """Seconds of one iteration; the arguments of `CostModel.step_s`."""
        return self.base_s + self.token_s * new_tokens

    def copy_s(self, to_host_tokens: int, to_device_tokens: int, within_tokens: int) -> float:
        """Free: the instances have memory to spare."""
        return 0.0


def small_instance(seed: int) -> list[WorkloadItem]:
    """Two RT and three BE requests within a fraction of a second."""
    rng = np.random.default_rng([seed, 7])
    items = [WorkloadItem(0.0, RequestClass.BEST_EFFORT, int(rng.integers(10, 40)), int(rng.integers(3, 7)))
             for _ in range(3)]
    for _ in range(2):
        items.append(WorkloadItem(float(rng.uniform(0, 0.15)), RequestClass.REAL_TIME, int(rng.integers(5, 20)),
                                  int(rng.integers(2, 4)), SLO(0.12, 0.06)))
    return items


def clairvoyant_be_tokens(items: list[WorkloadItem], horizon_s: float, cost: LinearCost, seats: int,
                          max_steps: int = 10) -> int | None:
    """The most BE tokens that any schedule can have emitted by the horizon with every RT on time; None if no schedule
    of at most `max_steps` iterations has them on time, or the solver gave up.

    Variables, for request i and step k: prefill[i, k] and decode[i, k] (0/1), used[k], start[k], end[k], and first[i],
    when its first token comes. A prefill is not split into chunks.
    """
    n, steps = len(items), range(max_steps)
    used, start, end = (2 * n * max_steps + part * max_steps for part in range(3))
    first = end + max_steps
    size = first + n

    def prefill(i: int, k: int) -> int:
        return i * max_steps + k

    def decode(i: int, k: int) -> int:
        return (n + i) * max_steps + k

    rows: list[tuple[Mapping[int, float], float, float]] = []  # coefficients, lower, upper
    big = 2 * horizon_s
    for k in steps:
        spent = {prefill(i, k): -cost.token_s * item.prompt_tokens for i, item in enumerate(items)}
        spent |= {decode(i, k): -cost.token_s for i in range(n)}
        rows.append(({end + k: 1, start + k: -1, used + k: -cost.base_s, **spent}, 0, 0))
        rows.append(({index: 1 for i in range(n) for index in (prefill(i, k), decode(i, k))} | {used + k: -seats},
                     -math.inf, 0))
        if k:
            rows.append(({start + k: 1, end + k - 1: -1}, 0, math.inf))
    for i, item in enumerate(items):
        decodes = item.output_tokens - 1
        exactly = item.slo is not None
        rows.append(({prefill(i, k): 1 for k in steps}, float(exactly), 1))
        rows.append(({decode(i, k): 1 for k in steps}, decodes if exactly else 0, decodes))
        for k in steps:
            rows.append(({decode(i, k): 1} | {prefill(i, j): -1 for j in range(k)}, -math.inf, 0))
            rows.append(({start + k: 1, prefill(i, k): -item.arrival_s}, 0, math.inf))
            if item.slo is not None:
                rows.append(({end + k: 1, prefill(i, k): big}, -math.inf, big + item.arrival_s + item.slo.ttft_s))
                rows.append(({first + i: 1, end + k: -1, prefill(i, k): big}, -math.inf, big))
                rows.append(({end + k: 1, first + i: -1, decode(i, k): big}, -math.inf,
                             big + decodes * item.slo.tpot_s))
    matrix = lil_matrix((len(rows), size))
    for row, (coefficients, _, _) in enumerate(rows):
        for column, value in coefficients.items():
            matrix[row, column] = value
    objective = np.zeros(size)
    for i, item in enumerate(items):
        if item.slo is None:
            objective[[index for k in steps for index in (prefill(i, k), decode(i, k))]] = -1
    integrality = np.concatenate([np.ones(start), np.zeros(size - start)])
    limits = LinearConstraint(matrix.tocsr(), [row[1] for row in rows], [row[2] for row in rows])
    with _silent_stdout():
        result = milp(objective, constraints=limits, integrality=integrality, options={"time_limit": 20.0},
                      bounds=Bounds(0, np.concatenate([np.ones(start), np.full(size - start, horizon_s)])))
    best: int | None = round(-result.fun) if result.status == 0 else None
    return best


def served_be_tokens(policy: str, items: list[WorkloadItem], horizon_s: float, cost: LinearCost,
                     seats: int) -> tuple[int, bool]:
    """What a policy does with the same instance: BE tokens emitted by the horizon, and whether all RT were on time."""
    clock, kv_config = VirtualClock(), KVCacheConfig(256)
    latency = StepLatencyModel((cost.base_s, cost.token_s, 0, 0))
    scheduler = make_scheduler(policy, SchedulerConfig(max_num_seqs=seats), kv_config, latency)
    runner = SimulatedRunner(cost, clock)
    engine = LLMEngine(scheduler, runner, clock, trace=Trace(policy, "linear", "simulated", 256, 16, 0, 0))
    serve(engine, Workload(items), request_of_length)
    assert engine.trace is not None
    timings = request_timings(engine.trace).values()
    tokens = sum(time_s <= horizon_s + 1e-9 for timing in timings if timing.record.request_class == "be"
                 for time_s in timing.token_times_s)
    return tokens, all(timing.met_ttft and timing.met_tpot for timing in timings
                       if timing.record.request_class == "rt")


def small_instance_gaps(seed: int, count: int = 16, policies: tuple[str, ...] = ("vllm-priority", "bros"),
                        horizon_s: float = 0.26, seats: int = 4) -> dict[str, Any]:
    """Over `count` seeded instances that the clairvoyant can solve: per policy, how often all RT were on time, and BE
    tokens by the horizon / the clairvoyant's (which alone must have all RT on time)."""
    cost, solved = LinearCost(), 0
    served: dict[str, list[tuple[float, bool]]] = {policy: [] for policy in policies}
    for index in range(count):
        items = small_instance(seed * 1000 + index)
        optimum = clairvoyant_be_tokens(items, horizon_s, cost, seats)
        if not optimum:
            continue
        solved += 1
        for policy in policies:
            tokens, on_time = served_be_tokens(policy, items, horizon_s, cost, seats)
            served[policy].append((tokens / optimum, on_time))
    return {"instances": solved, **{policy: {
        "mean_be_share": float(np.mean([share for share, _ in results])) if results else None,
        "all_rt_on_time": float(np.mean([on_time for _, on_time in results])) if results else None}
        for policy, results in served.items()}}
