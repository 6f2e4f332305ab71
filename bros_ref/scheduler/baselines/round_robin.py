"""BROS-RR, the paper's second baseline: a fixed rotation of the classes, and an ordinary paged KV cache.

Iterations alternate: one for RT, one for BE; a class with nothing to do passes its turn to the other. Within a class,
running requests go first, then its queue in order of arrival. When blocks run out, the BE admitted last is recomputed;
if there is no BE, an RT recomputes the RT admitted last. A new request never preempts one of its own class. (The paper
says only "no bidirectional KV"; the victim is our decision, so that RT does not wait for the memory of BE.)
"""

from __future__ import annotations

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED, BATCH_CAP
from bros_ref.scheduler.queues import FIFOQueue


class RoundRobinScheduler(Scheduler):
    """One iteration for each class in turn."""

    def setup(self) -> None:
        self._waiting = {True: FIFOQueue(), False: FIFOQueue()}  # by is_rt
        self._rt_turn = False

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        self._waiting[request.is_rt].push(request, front=front)

    def dequeue(self, request: Request) -> None:
        self._waiting[request.is_rt].pop()

    def pack(self, now_s: float) -> None:
        self._rt_turn = not self._rt_turn
        self._pack_class(self._rt_turn)
        if not self.output.requests:
            self._rt_turn = not self._rt_turn
            self._pack_class(self._rt_turn)

    def _pack_class(self, is_rt: bool) -> None:
        for request in [started for started in self.running if started.is_rt is is_rt]:
            if self.try_admit(request) is BATCH_CAP:
                return
        while (newcomer := self._waiting[is_rt].head()) and self.try_admit(newcomer) is ADMITTED:
            pass

    def can_admit(self, request: Request) -> bool:
        return request.is_rt or super().can_admit(request)

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        others = [other for other in self.running if other.is_rt is not request.is_rt]
        if request.status is RequestStatus.WAITING and not (request.is_rt and others):
            return False  # a BE newcomer preempts nobody; an RT newcomer takes room from BE only
        own = [other for other in self.running if other.is_rt is request.is_rt]
        victim = (others if request.is_rt and others else own)[-1]
        self.recompute(victim)
        return victim is not request
