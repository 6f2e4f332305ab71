"""SCORPIO: reject what cannot be on time, admit by a virtual batch size, decode by credits.

After SCORPIO's public code, a fork of vLLM V0 (so whole prompts, prompts before decodes, recomputation of the newest):

    TTFT guard   the queue is sorted by what remains of each TTFT target. Before that it is walked, and a request is
                 rejected if the prompts up to its own take longer than what remains, less 50 ms: a miss, at once
    TPOT guard   a request is admitted only if the predicted decode step, times a gate of 1.3, stays below 0.99 of
                 the tightest TPOT. A request with a looser TPOT counts for less than one: the virtual batch size
    credits      the tightest class decodes in every step; others earn tightest / own TPOT per step, and run for 1

Ours, where a best-effort class has no place there: BE is never rejected, goes behind all RT in order of arrival, adds
nothing to the walk, and has the loosest TPOT class of any RT so far, at least `BE_TPOT_S`. (With a class of 1 s in the
paper's setting it had half the BE tokens/s and no more RT on time.) SCORPIO predicts output lengths with a classifier;
here it is told `max_tokens`, the best case for it. Its fitted times are those of the scheduler's latency model. A
preempted request that has had its first token is not rejected and goes first. If nothing else runs, the first
request is admitted whatever is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bros_ref.request import Request
from bros_ref.scheduler.baselines.vllm_v0 import VLLMV0Scheduler
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.scheduler.output import ADMITTED

REJECTION_MARGIN_S = 0.05
FLAT_PREFILL_TOKENS = 128  # theta: shorter prefills take as long as one of this length
GATE, TPOT_SHARE = 1.3, 0.99
BE_TPOT_S = 0.2  # ours


def prefill_s(latency: StepLatencyModel, num_tokens: int) -> float:
    """W(n): seconds to prefill n tokens; constant up to theta, linear beyond."""
    return latency.c0 + latency.c1 * max(num_tokens, FLAT_PREFILL_TOKENS)


def hopeless(queue: Sequence[tuple[int, float]], latency: StepLatencyModel) -> list[bool]:
    """Which requests to reject, of (prompt tokens, seconds left of TTFT) in order; a rejected one delays no other."""
    rejected, ahead = [], 0
    for prompt_tokens, remaining_s in queue:
        ahead += prompt_tokens
        rejected.append(remaining_s < prefill_s(latency, ahead) + REJECTION_MARGIN_S)
        if rejected[-1]:
            ahead -= prompt_tokens
    return rejected


def virtual_batch_size(tpots_s: Sequence[float]) -> float:
    """Average number of requests per step that the credits allow to run."""
    tightest_s = min(tpots_s)
    return sum(tightest_s / tpot_s for tpot_s in tpots_s)


def keeps_tpot(tpots_s: Sequence[float], lengths: Sequence[tuple[int, int]], latency: StepLatencyModel) -> bool:
    """Whether a decode step of these requests fits the tightest TPOT; `lengths`: (input, predicted output) tokens of
    each. The average context of a request is taken as L / 2, where L = 2 * input + output."""
    size = virtual_batch_size(tpots_s)
    length = sum(2 * inputs + outputs for inputs, outputs in lengths) / len(lengths)
    predicted_s = 0.5 * latency.c3 * size * length + latency.c1 * size + latency.c0
    return predicted_s * GATE < TPOT_SHARE * min(tpots_s)


class ScorpioScheduler(VLLMV0Scheduler):
    """TTFT guard, TPOT guard, and credits."""

    def setup(self) -> None:
        self._queue: list[Request] = []
        self._credits: dict[str, float] = {}
        self._loosest_s = BE_TPOT_S

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        if request.slo is not None:
            self._loosest_s = max(self._loosest_s, request.slo.tpot_s)
        self._queue.insert(0 if front else len(self._queue), request)
        self._credits.pop(request.request_id, None)  # whoever was preempted starts over

    def dequeue(self, request: Request) -> None:
        self._queue.remove(request)

    def pack(self, now_s: float) -> None:
        self._queue = [request for request in self._queue if not request.status.is_end]
        self._reject(now_s)
        self._queue.sort(key=lambda request: (_remaining_s(request, now_s), request.arrival_s))
        for request in list(self._queue):
            if len(self.running) < self.max_batch_size and not self._guard_admits(request):
                break
            if self.admit_newcomer(request) is not ADMITTED:
                break
        if not self.output.requests:
            self._decode()

    def _reject(self, now_s: float) -> None:
        guarded = [request for request in self._queue if request.is_rt and request.first_token_s is None]
        walk = [(request.num_tokens, _remaining_s(request, now_s)) for request in guarded]
        for request, rejected in zip(guarded, hopeless(walk, self.latency), strict=True):
            if rejected:
                self._queue.remove(request)
                self.output.rejected.append(request.request_id)

    def _guard_admits(self, request: Request) -> bool:
        batch = [*self.running, request]
        return not self.running or keeps_tpot(
            [self._tpot_s(other) for other in batch],
            [(other.num_prompt_tokens, other.sampling.max_tokens) for other in batch], self.latency)

    def _decode(self) -> None:
        if not self.running:
            return
        tightest_s = min(self._tpot_s(request) for request in self.running)
        earned = {request.request_id: tightest_s / self._tpot_s(request) for request in self.running}
        self._credits = {name: self._credits.get(name, 0.0) + share for name, share in earned.items()}
        for request in self.running:  # a preemption shortens the list at its end: the loop ends earlier then
            is_tightest = self._tpot_s(request) == tightest_s
            if is_tightest or self._credits[request.request_id] >= 1 - 1e-9:  # sums of fractions fall short of 1
                self._credits[request.request_id] -= 1.0
                self.try_admit(request)

    def _tpot_s(self, request: Request) -> float:
        return self._loosest_s if request.slo is None else request.slo.tpot_s


def _remaining_s(request: Request, now_s: float) -> float:
    if not request.is_rt or request.slo is None:
        return math.inf
    return request.slo.ttft_s - (now_s - request.arrival_s) if request.first_token_s is None else -math.inf
