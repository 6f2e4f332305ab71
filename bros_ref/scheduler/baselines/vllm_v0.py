"""vLLM V0, the scheduler of vLLM until 2025 and probably the baseline of the paper: prompts first, then decodes.

A step either prefills or decodes. If any request can be admitted, the step computes whole prompts, first come first
served, while seats, tokens and blocks last, and all decodes wait; otherwise all running requests decode. Admission
leaves `WATERMARK` of the blocks free for decodes. When a decode gets no block, the newest of RUNNING is preempted by
recomputation (this may be the one that asked) and goes to the front of WAITING. (vLLM's rules, default settings: no
chunked prefill, no prefix cache, no swapping.) Ours: the watermark does not apply if nothing else is running.
"""

from __future__ import annotations

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED
from bros_ref.scheduler.queues import FIFOQueue

WATERMARK = 0.01  # share of the pool that admission keeps free


def leaves_watermark(num_needed: int, num_free: int, num_blocks: int) -> bool:
    """Whether `WATERMARK` of all blocks is still free once `num_needed` of the free ones are taken."""
    return num_free - num_needed >= int(WATERMARK * num_blocks)


class VLLMV0Scheduler(Scheduler):
    """First come first served, with separate prefill and decode steps."""

    def setup(self) -> None:
        self._waiting = FIFOQueue()

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        self._waiting.push(request, front=front)

    def dequeue(self, request: Request) -> None:
        self._waiting.pop()

    def pack(self, now_s: float) -> None:
        while (request := self._waiting.head()) and self.admit_newcomer(request) is ADMITTED:
            pass
        if not self.output.requests:
            for started in self.running:  # a preemption shortens the list at its end: the loop ends earlier then
                self.try_admit(started)

    def can_admit(self, request: Request) -> bool:
        kv = self.kv
        return super().can_admit(request) and (not self.running or leaves_watermark(
            kv.blocks_for(request.num_tokens), kv.num_free_blocks, kv.config.num_blocks))

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        if request.status is RequestStatus.WAITING:
            return False  # a newcomer preempts nobody
        victim = self.running[-1]
        self.recompute(victim)
        return victim is not request
