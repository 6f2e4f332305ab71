"""QoServe (Niyama): chunks as long as the least slack allows, deadlines mixed with remaining work, and relegation.

After its public branch of sarathi-serve. Every step decodes all requests that have their prompt, then prefills up to a
total of tokens:

    decode deadline   arrival + max(time to first token, TTFT target) + TPOT target * (tokens so far + 1)
    total             the largest of 128, 256, ..., 2,048 (by 256) and 2,552 whose predicted time, times 1.2, is at most
                      the least slack of a decode; 128 if none is
    order of prefill  (relegated, arrival + TTFT target + 8 ms per remaining prompt token)
    relegated         a request without memory whose prompt, at the throughput so far, would be late

A prefill never preempts another request. Ours, where it says nothing: BE has the target of QoServe's loosest class,
1,800 s, and sets no slack; a relegated RT therefore goes behind BE, as it goes behind every other class there. The
total is capped by the limit that all policies share. Throughput is a moving average over steps. When a running request
gets no block, the one that is last in order is recomputed; this may be the request itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED, BATCH_CAP, SchedulerOutput

TOTALS: tuple[int, ...] = (128, *range(256, 2049, 256), 2552)
SAFETY = 1.2
REMAINING_WEIGHT_S = 0.008  # per prompt token
BE_TTFT_S = 1800.0  # the loosest class of its paper
THROUGHPUT_EMA = 0.1  # weight of the newest step; ours


def decode_deadline_s(arrival_s: float, first_token_s: float, ttft_slo_s: float, tpot_slo_s: float,
                      num_outputs: int) -> float:
    """Deadline of the next token of a request that has emitted `num_outputs` tokens."""
    return arrival_s + max(first_token_s - arrival_s, ttft_slo_s) + tpot_slo_s * (num_outputs + 1)


def step_total(slack_s: float, predict_s: Callable[[int], float]) -> int:
    """Number of tokens in the step; `predict_s(n)` is the predicted time of a step of n tokens."""
    return max((total for total in TOTALS if SAFETY * predict_s(total) <= slack_s), default=TOTALS[0])


def order_key(relegated: bool, arrival_s: float, ttft_slo_s: float, remaining_tokens: int) -> tuple[bool, float]:
    """Sort key of prefills: the smallest is prefilled first."""
    return relegated, arrival_s + ttft_slo_s + REMAINING_WEIGHT_S * remaining_tokens


def is_relegated(now_s: float, remaining_tokens: int, tokens_per_s: float, deadline_s: float,
                 holds_memory: bool) -> bool:
    """Whether a request is expected to miss its TTFT target; False while the throughput is unknown."""
    return not holds_memory and tokens_per_s > 0 and now_s + remaining_tokens / tokens_per_s > deadline_s


class QoServeScheduler(Scheduler):
    """Dynamic chunks, hybrid priority, eager relegation."""

    def setup(self) -> None:
        self._waiting: list[Request] = []
        self._tokens_per_s = 0.0

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        self._waiting.append(request)

    def dequeue(self, request: Request) -> None:
        self._waiting.remove(request)

    def pack(self, now_s: float) -> None:
        self._waiting = [request for request in self._waiting if not request.status.is_end]
        decodes = [request for request in self.running if request.num_tokens - request.num_computed_tokens == 1]
        for request in decodes:
            self.try_admit(request)
        prefills = [request for request in self.running if request.num_tokens - request.num_computed_tokens > 1]
        candidates = sorted([*prefills, *self._waiting], key=lambda request: self._key(request, now_s))
        if candidates:
            self._set_total(now_s, decodes, candidates[0])
        self._prefill(candidates)

    def _set_total(self, now_s: float, decodes: Sequence[Request], first: Request) -> None:
        spent_tokens, spent_s, context = self.output.features.new_tokens, self.executing_s, first.num_computed_tokens
        slack_s = min((_decode_slack_s(request, now_s) for request in decodes), default=math.inf)
        total = step_total(slack_s, lambda total: spent_s + self.latency.cost_s(
            max(total - spent_tokens, 0), context))
        self.max_step_tokens = min(total, self.config.max_num_batched_tokens)

    def _prefill(self, candidates: Sequence[Request]) -> None:
        queue_open, seats_full = True, False
        for request in candidates:
            is_newcomer = request.status is RequestStatus.WAITING
            if is_newcomer and (not queue_open or len(self.running) >= self.max_batch_size):
                if queue_open and not seats_full:  # the first of the queue; the others stand behind it
                    self.refuse(request, BATCH_CAP)
                    seats_full = True
                continue
            answer = self.try_admit(request)
            if answer == BATCH_CAP or self.output.features.new_tokens >= self.max_step_tokens:
                return
            queue_open = queue_open and not (is_newcomer and answer is not ADMITTED)  # the rest stands behind it

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        if request.status is RequestStatus.WAITING:
            return False
        victim = max(self.running, key=lambda other: self._key(other, self.output.now_s))
        self.recompute(victim)
        return victim is not request

    def update_from_output(self, output: SchedulerOutput, token_ids: Sequence[int | None], now_s: float,
                           duration_s: float) -> list[Request]:
        if duration_s > 0:
            weight = THROUGHPUT_EMA if self._tokens_per_s else 1.0
            self._tokens_per_s += weight * (output.features.new_tokens / duration_s - self._tokens_per_s)
        return super().update_from_output(output, token_ids, now_s, duration_s)

    def _key(self, request: Request, now_s: float) -> tuple[bool, float, bool, str]:
        ttft_s = BE_TTFT_S if request.slo is None else request.slo.ttft_s
        remaining = request.num_tokens - request.num_computed_tokens
        relegated = is_relegated(now_s, remaining, self._tokens_per_s, request.arrival_s + ttft_s,
                                 request.status is RequestStatus.RUNNING)
        return *order_key(relegated, request.arrival_s, ttft_s, remaining), not request.is_rt, request.request_id


def _decode_slack_s(request: Request, now_s: float) -> float:
    if request.slo is None or request.first_token_s is None:
        return math.inf
    return decode_deadline_s(request.arrival_s, request.first_token_s, request.slo.ttft_s, request.slo.tpot_s,
                             len(request.output_token_ids)) - now_s
