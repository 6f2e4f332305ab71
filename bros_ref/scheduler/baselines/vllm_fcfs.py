"""vLLM V1, first come first served: RUNNING in admission order, then WAITING while seats, tokens and blocks last.

Mirrors `vllm/v1/core/sched/scheduler.py` (policy "fcfs", no prefix cache): decodes and prefill chunks share one token
budget; when a running request gets no block, the last of RUNNING is preempted by recomputation (this may be the one
that asked) and goes to the front of WAITING; nothing is admitted in a step with a preemption. A waiting request is
admitted only if all its known tokens fit (vLLM's default `scheduler_reserve_full_isl`). No deadlines.
"""

from __future__ import annotations

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED
from bros_ref.scheduler.queues import FIFOQueue


class VLLMFCFSScheduler(Scheduler):
    """First come first served, with preemption by recomputation."""

    def setup(self) -> None:
        self._waiting = FIFOQueue()

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        self._waiting.push(request, front=front)

    def dequeue(self, request: Request) -> None:
        self._waiting.pop()

    def pack(self, now_s: float) -> None:
        for started in self.running:  # a preemption shortens the list at its end: the loop ends earlier then
            self.try_admit(started)
        while not self.output.preempted and (request := self._waiting.head()):
            if self.admit_newcomer(request) is not ADMITTED:
                return

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        if request.status is RequestStatus.WAITING:
            return False  # a newcomer preempts nobody
        victim = self.running[-1]
        self.recompute(victim)
        return victim is not request
