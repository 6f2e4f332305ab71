"""Traces without an engine: a toy loop over the package's own KV accounting, seeded and instant.

It is no scheduler to learn from. It makes traces with everything in them that a figure must show: two classes,
waiting, prefill, decode, pending, overwritten slots, restores, recompute preemption, refusals, an abort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.bidirectional import BidirectionalKVCacheManager
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import SLO, Request, RequestClass, SamplingParams
from bros_ref.trace import BATCH_CAP, NO_BLOCKS, BlockView, RequestRecord, StepRecord, Trace

TARGETS = SLO(ttft_s=0.4, tpot_s=0.2)


@dataclass
class Toy:
    """One run. `snapshots` and `copies` are what the cache manager itself says after each decision, to compare
    `Trace.pools` and `Trace.copies` with: blocks, and (kind, device slot) of every copied slot."""

    trace: Trace
    manager: KVCacheManager
    batch_cap: int
    rng: np.random.Generator
    requests: dict[str, Request] = field(default_factory=dict)
    coming: list[Request] = field(default_factory=list)
    snapshots: list[list[BlockView]] = field(default_factory=list)
    copies: list[list[tuple[str, int]]] = field(default_factory=list)
    now_s: float = 0.0


def make_trace(policy: str = "bros", seed: int = 0, **kwargs: int) -> Trace:
    """A finished run of `make_toy`."""
    return make_toy(policy, seed, **kwargs).trace


def make_toy(policy: str = "bros", seed: int = 0, num_rt: int = 14, num_be: int = 10, num_blocks: int = 40,
             block_size: int = 16, batch_cap: int = 8) -> Toy:
    """"bros": real-time first, two owners a block; any other name: first come first served, recompute preemption."""
    config = KVCacheConfig(num_blocks, block_size)
    manager = BidirectionalKVCacheManager(config) if policy == "bros" else KVCacheManager(config)
    trace = Trace(policy, "toy-135m", "cpu", num_blocks, block_size, slot_bytes=46_080, seed=seed)
    toy = Toy(trace, manager, batch_cap, np.random.default_rng(seed))
    room = num_blocks * block_size
    arrivals = np.cumsum(toy.rng.exponential(0.35, num_rt)).tolist()
    for i, arrival_s in enumerate([0.0] * num_be + arrivals):
        is_rt = i >= num_be
        prompt, output = (toy.rng.integers(8, 40), toy.rng.integers(4, 24)) if is_rt else (
            toy.rng.integers(60, 120), toy.rng.integers(20, 60))
        prompt, output = min(int(prompt), room // 2), min(int(output), room // 4)
        _arrive(toy, f"{'rt' if is_rt else 'be'}-{i - num_be if is_rt else i}", is_rt, arrival_s, prompt, output)
    _arrive(toy, "rt-refused", True, 1.0, room + 1, 4)
    while _step(toy):
        pass
    return toy


def _arrive(toy: Toy, request_id: str, is_rt: bool, arrival_s: float, prompt: int, output: int) -> None:
    slo = TARGETS if is_rt else None
    toy.trace.requests[request_id] = RequestRecord(request_id, "rt" if is_rt else "be", arrival_s, prompt, output,
                                                   slo and slo.ttft_s, slo and slo.tpot_s)
    if prompt + output > toy.trace.num_blocks * toy.trace.block_size:
        toy.trace.rejected[request_id] = "longer than the KV pool"
        return
    toy.coming.append(Request(request_id, RequestClass.REAL_TIME if is_rt else RequestClass.BEST_EFFORT,
                              [1] * prompt, SamplingParams(max_tokens=output), arrival_s, slo))


def _step(toy: Toy) -> bool:
    """One iteration; False when nothing is left."""
    for request in [request for request in toy.coming if request.arrival_s <= toy.now_s]:
        toy.requests[request.request_id] = request
        toy.coming.remove(request)
    leaver = toy.requests.get("rt-3")
    if leaver is not None and len(leaver.output_token_ids) == 2:  # a user who goes away between two steps
        toy.manager.free("rt-3")
        del toy.requests["rt-3"]
        toy.trace.ended_outside["rt-3"] = [toy.now_s, "aborted"]
    if not toy.requests:
        if not toy.coming:
            return False
        toy.now_s = min(request.arrival_s for request in toy.coming)
        return True
    bros = toy.trace.policy == "bros"
    order = list(toy.requests.values())
    order.sort(key=lambda request: (bros and not request.is_rt, request.arrival_s))
    step = _empty_step(toy)
    toy.manager.begin_step([request for request in order if not request.is_rt and request.num_computed_tokens])
    for place, request in enumerate(order):
        _admit(toy, step, request, order[place + 1:])
    _run(toy, step)
    return bool(step.scheduled)  # a pool too small for anyone ends the run, with requests unfinished


def _empty_step(toy: Toy) -> StepRecord:
    return StepRecord(step=len(toy.trace.steps), start_s=toy.now_s, duration_s=0.0,
                      schedule_s=float(toy.rng.uniform(2e-4, 9e-4)), predicted_s=None, step_budget_s=None, binding=None,
                      scheduled={}, emitted=[], finished={}, preempted={}, slack_s={}, left_out={}, num_behind=0,
                      block_changes=[], offloaded=[], copied={}, recomputed_tokens=0, num_waiting=0, num_running=0,
                      used_blocks=0)


def _admit(toy: Toy, step: StepRecord, request: Request, behind: list[Request]) -> None:
    if request.request_id in step.preempted:
        return
    if len(step.scheduled) >= toy.batch_cap:
        step.left_out[request.request_id] = step.binding = BATCH_CAP
        return
    wanted = request.num_tokens - request.num_computed_tokens
    while toy.manager.allocate_slots(request, wanted) is None:
        if not request.is_rt and toy.manager.reclaim(request, wanted):
            continue
        victims = [other for other in behind if other.num_computed_tokens and other.request_id not in step.preempted]
        if toy.trace.policy == "bros" or not request.num_computed_tokens or not victims:
            step.left_out[request.request_id] = step.binding = NO_BLOCKS
            return
        victim = victims[-1]
        toy.manager.free(victim.request_id)
        step.preempted[victim.request_id] = "recompute"
        step.recomputed_tokens += victim.num_computed_tokens
        victim.num_computed_tokens = 0
    step.scheduled[request.request_id] = wanted


def _run(toy: Toy, step: StepRecord) -> None:
    """Takes the changes, lets time pass, hands out tokens, frees what has ended."""
    changes = toy.manager.take_changes()
    step.block_changes, step.offloaded = list(changes.block_changes), list(changes.offloaded)
    step.copied = {kind: len(getattr(changes.copies, kind)) for kind in ("checkpoint", "restore", "relocate")}
    step.used_blocks = toy.manager.num_used_blocks
    step.num_running, step.num_waiting = len(step.scheduled), len(toy.requests) - len(step.scheduled)
    toy.snapshots.append(toy.manager.snapshot())
    plan = changes.copies
    toy.copies.append(sorted([("checkpoint", slot) for slot, _ in plan.checkpoint]
                             + [(kind, slot) for kind in ("restore", "relocate") for _, slot in getattr(plan, kind)]))
    tokens = sum(step.scheduled.values())
    context = sum(toy.requests[request_id].num_tokens for request_id in step.scheduled)
    step.predicted_s = 0.02 + 4e-4 * tokens + 1e-5 * context
    step.duration_s = step.predicted_s * math.exp(float(toy.rng.normal(0, 0.06)))
    for request_id, num_tokens in step.scheduled.items():
        request = toy.requests[request_id]
        request.num_computed_tokens += num_tokens
        request.num_tokens += 1
        request.output_token_ids.append(1)
        step.emitted.append(request_id)
        if len(request.output_token_ids) == request.sampling.max_tokens:
            step.finished[request_id] = "length"
    for request_id in step.finished:
        toy.manager.free(request_id)
        del toy.requests[request_id]
    toy.trace.steps.append(step)
    toy.now_s = step.end_s + step.schedule_s
