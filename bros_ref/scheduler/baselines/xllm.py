"""xLLM: online before offline, urgent by density, and whole offline requests dropped when memory runs short.

After its public C++ code. RT is its online class, BE its offline class:

    budget      of a step: the least time that remains to an online deadline, but at least 0.65 of the least TPOT
    URGENT      an online request with less time than `total * budget / (budget - overhead)`: what all online requests
                take, stretched by the fixed time of every step
    order       starving, then urgent ones with most value per second of work (so the shortest first), then the rest of
                the online ones by deadline, then offline ones in order of arrival
    memory      an online request without blocks, waiting or running, drops running offline requests, the newest first;
                they are recomputed. There is no block with two owners, no partial preemption and no share for offline

Ours, where it says nothing: its factor lambda is 1, all online requests are worth the same, one is starving after
`STARVING_STEPS` steps without running, and with no offline request left to drop, the running online request with the
latest deadline is recomputed; this may be the one that asked. The first request of an empty batch is admitted whatever
the budget.
"""

from __future__ import annotations

import math

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED, BATCH_CAP, Admission
from bros_ref.scheduler.queues import FIFOQueue

TPOT_SHARE = 0.65
LAMBDA = 1.0
STARVING_STEPS = 64


def step_budget_s(least_remaining_s: float, least_tpot_s: float) -> float:
    """How long the step may take."""
    return max(least_remaining_s, TPOT_SHARE * least_tpot_s)


def is_urgent(remaining_s: float, total_s: float, budget_s: float, overhead_s: float) -> bool:
    """`total_s` is the work of all online requests; each step of `budget_s` spends `overhead_s` on its fixed cost."""
    if budget_s <= overhead_s:
        return True
    stretch = 1.0 if math.isinf(budget_s) else budget_s / (budget_s - overhead_s)
    return remaining_s < LAMBDA * total_s * stretch


def online_key(starving: bool, urgent: bool, work_s: float, remaining_s: float) -> tuple[bool, bool, float]:
    """Sort key, smallest first: urgent requests by density, the others by deadline."""
    return not starving, not urgent, work_s if urgent else remaining_s


class XLLMScheduler(Scheduler):
    """Two classes, urgency, and preemption of whole offline requests."""

    def setup(self) -> None:
        self._online: list[Request] = []  # waiting
        self._offline = FIFOQueue()  # waiting

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        if request.is_rt:
            self._online.append(request)
        else:
            self._offline.push(request, front=front)

    def dequeue(self, request: Request) -> None:
        if request.is_rt:
            self._online.remove(request)
        else:
            self._offline.pop()

    def pack(self, now_s: float) -> None:
        self._online = [request for request in self._online if not request.status.is_end]
        online = [*(request for request in self.running if request.is_rt), *self._online]
        budget_s = step_budget_s(min((request.deadline_s - now_s for request in online), default=math.inf),
                                 min((request.slo.tpot_s for request in online if request.slo), default=math.inf))
        work_s = {request.request_id: self._work_s(request) for request in online}
        total_s = sum(work_s.values())

        def key(request: Request) -> tuple[bool, bool, float, str]:
            remaining_s = request.deadline_s - now_s
            return *online_key(self.step - request.last_step > STARVING_STEPS,
                               is_urgent(remaining_s, total_s, budget_s, self.latency.c0),
                               work_s[request.request_id], remaining_s), request.request_id

        for request in sorted(online, key=key):
            if self._take(request, budget_s) == BATCH_CAP:
                return
        self._pack_offline(budget_s)

    def _pack_offline(self, budget_s: float) -> None:
        for request in [started for started in self.running if not started.is_rt]:
            if self._take(request, budget_s) == BATCH_CAP:
                return
        while newcomer := self._offline.head():
            if len(self.running) >= self.max_batch_size:
                self.refuse(newcomer, BATCH_CAP)
                return
            if self._take(newcomer, budget_s) != ADMITTED:
                return

    def _take(self, request: Request, budget_s: float) -> Admission:
        return self.try_admit(request, budget_s, exempt=not self.output.requests)

    def can_admit(self, request: Request) -> bool:
        held = sum(self.kv.num_device_blocks(other.request_id) for other in self.running if not other.is_rt)
        free = self.kv.num_free_blocks + (held if request.is_rt else 0)
        return self.kv.blocks_for(request.num_tokens) <= free

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        is_newcomer = request.status is RequestStatus.WAITING
        if request.is_rt and self._drop_offline():
            return True
        if is_newcomer:
            return False
        own = [other for other in self.running if other.is_rt is request.is_rt]
        victim = max(own, key=lambda other: other.deadline_s) if request.is_rt else own[-1]
        self.recompute(victim)
        return victim is not request

    def _drop_offline(self) -> bool:
        """Recomputes the newest running offline request; False if there is none."""
        victim = next((other for other in reversed(self.running) if not other.is_rt), None)
        if victim is not None:
            self.recompute(victim)
        return victim is not None

    def _work_s(self, request: Request) -> float:
        """Seconds of work until its next token, without the fixed time of a step."""
        return self.latency.cost_s(request.num_tokens - request.num_computed_tokens, request.num_computed_tokens)
