"""The cost of scheduling: CPU microseconds of `schedule` + `update_from_output` per scheduled request, no model at all.

A steady state: `running` decodes fill every seat (half RT, half BE), `waiting` BE requests queue behind them, block
boundaries are crossed as they come. Rounds of all policies alternate, and the median over rounds is reported, so that a
noisy neighbour slows no policy alone. CPU time of this thread, garbage collector on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.request import SLO, Request, RequestClass, SamplingParams
from bros_ref.scheduler import CHUNKED_POLICIES, make_scheduler
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.latency_model import StepLatencyModel

STEP_LATENCY = (0.005, 1e-6, 1e-9, 1e-9)  # seconds: what a step "takes", and what the model predicts
PROMPT_TOKENS = 64


@dataclass
class SchedulerRow:
    """One measured point. `us` are CPU microseconds."""

    policy: str
    running: int
    waiting: int
    us_per_request_step: float
    us_per_step: float


class SteadyState:
    """One scheduler held at `running` decodes with `waiting` requests behind them."""

    def __init__(self, policy: str, running: int, waiting: int) -> None:
        blocks_each = 96  # room for 1,536 tokens: nobody finishes or runs short while being measured
        config = SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=1 << 20, base_batch_cap=running,
                                 chunked_prefill=policy in CHUNKED_POLICIES)
        self.scheduler: Scheduler = make_scheduler(policy, config, KVCacheConfig(running * blocks_each + 64),
                                                   StepLatencyModel(STEP_LATENCY))
        self.truth = StepLatencyModel(STEP_LATENCY)
        self.running, self.now_s = running, 0.0
        for i in range(running):
            self._add(f"running{i}", is_rt=i % 2 == 0)
        while len(self.scheduler.running) < running or any(
                r.num_tokens - r.num_computed_tokens > 1 for r in self.scheduler.running):
            self.step()
        for i in range(waiting):
            self._add(f"waiting{i}", is_rt=False)

    def _add(self, name: str, is_rt: bool) -> None:
        self.scheduler.add(Request(
            name, RequestClass.REAL_TIME if is_rt else RequestClass.BEST_EFFORT, [1] * PROMPT_TOKENS,
            SamplingParams(max_tokens=1400), self.now_s, SLO(10.0, 0.2) if is_rt else None))

    def step(self) -> int:
        """One decision and its update; returns how many requests it scheduled."""
        output = self.scheduler.schedule(self.now_s)
        duration_s = self.truth.predict(output.features)
        self.now_s += duration_s
        count = len(output.requests)
        self.scheduler.update_from_output(output, [7] * count, self.now_s, duration_s)
        return count

    def cpu_us(self, steps: int) -> tuple[float, float]:
        """(us per request-step, us per step) over `steps` steps."""
        start, scheduled = time.thread_time(), 0
        for _ in range(steps):
            scheduled += self.step()
        spent_us = (time.thread_time() - start) * 1e6
        return spent_us / scheduled, spent_us / steps


def bench_scheduler(policies: Sequence[str] = ("bros", "vllm-priority", "vllm-fcfs"),
                    running: Iterable[int] = (64, 256, 1024), waiting: int = 10_000,
                    rounds: int = 5) -> tuple[list[SchedulerRow], dict[str, float]]:
    """Measures every policy at every size.

    Returns:
        The rows, and for each policy the slope: microseconds per step that one more running request costs, between
        the smallest and the largest size. Linear cost shows as a slope near `us_per_request_step` at every size.
    """
    rows = []
    for size in running:
        states = {policy: SteadyState(policy, size, waiting) for policy in policies}
        steps = max(4, 16_384 // size // 4)
        samples: dict[str, list[tuple[float, float]]] = {policy: [] for policy in policies}
        for _ in range(rounds):
            for policy, state in states.items():
                samples[policy].append(state.cpu_us(steps))
        for policy in policies:
            per_request, per_step = (statistics.median(column) for column in zip(*samples[policy], strict=True))
            rows.append(SchedulerRow(policy, size, waiting, per_request, per_step))
    slopes = {}
    for policy in policies:
        own = sorted((row for row in rows if row.policy == policy), key=lambda row: row.running)
        if len(own) > 1:
            slopes[policy] = (own[-1].us_per_step - own[0].us_per_step) / (own[-1].running - own[0].running)
    return rows, slopes


def as_json(rows: Sequence[SchedulerRow], slopes: dict[str, float]) -> dict[str, object]:
    """The shape that `bros-ref bench scheduler --json` promises, without the stamp."""
    return {"rows": [asdict(row) for row in rows], "slope": slopes}
