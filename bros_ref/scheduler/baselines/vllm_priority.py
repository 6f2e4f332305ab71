"""vLLM V1 with `--scheduling-policy priority`: RT is priority 0, BE priority 1.

As `vllm_fcfs.py`, except that WAITING is ordered by (priority, arrival, request id), and the victim of a shortage is
the *worst* (priority, arrival) among RUNNING, even if it is already in the batch. A waiting request never
preempts a running one, however urgent it is, so RT still waits when the batch or the pool is full.
"""

from __future__ import annotations

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED
from bros_ref.scheduler.queues import PriorityQueue, by_class_and_arrival


class VLLMPriorityScheduler(Scheduler):
    """Static priority by class, with preemption by recomputation."""

    def setup(self) -> None:
        self._waiting = PriorityQueue()

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        self._waiting.push(request)

    def dequeue(self, request: Request) -> None:
        self._waiting.pop()

    def pack(self, now_s: float) -> None:
        for started in list(self.running):
            was_running = started.status is RequestStatus.RUNNING
            self.try_admit(started)
            if was_running and started.status is RequestStatus.WAITING:
                return  # it was the worst itself: vLLM ends the step's list there
        while not self.output.preempted and (request := self._waiting.head()):
            if self.admit_newcomer(request) is not ADMITTED:
                return

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        if request.status is RequestStatus.WAITING:
            return False
        victim = max(self.running, key=by_class_and_arrival)
        self.recompute(victim)
        return victim is not request
