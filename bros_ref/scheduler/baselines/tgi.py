"""TGI-like: first in first out, and room for prompt + max_new_tokens is reserved at admission.

After Hugging Face text-generation-inference: nothing is ever preempted, because nothing can run out of blocks; the
price is a smaller batch. New requests are prefilled in a step of their own, whole prompts, while the decodes wait;
then all requests decode. (TGI's `waiting_served_ratio` is taken as 0: it prefills as soon as a request fits.)
"""

from __future__ import annotations

from bros_ref.request import Request
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED
from bros_ref.scheduler.queues import FIFOQueue


class TGIScheduler(Scheduler):
    """FIFO with reservation."""

    reserves_whole_requests = True

    def setup(self) -> None:
        self._waiting = FIFOQueue()

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        self._waiting.push(request, front=front)

    def dequeue(self, request: Request) -> None:
        self._waiting.pop()

    def pack(self, now_s: float) -> None:
        decoding = list(self.running)
        while (request := self._waiting.head()) and self.admit_newcomer(request) is ADMITTED:
            pass
        if not self.output.requests:
            for request in decoding:
                self.try_admit(request)
