"""SGLang-like with `--enable-priority-scheduling`: RT before BE; RT retracts BE when request *slots* are full.

After SGLang's scheduler (priority scheduling, chunked prefill, no radix cache): if any request can be admitted, a
prefill step runs before the next decode step. Admission needs blocks for the prompt and for a fraction
(`new_token_ratio`) of what all running requests may still generate. When all slots are taken, a new RT retracts the BE
that arrived last; when the KV pool is full, nothing is retracted for a new request. When decoding itself runs out of
blocks, requests with the least output (then the longest prompt) are retracted until it fits. A retracted request is
recomputed. The ratio starts at 0.7 and decays to 0.1 over 600 decode steps, and returns to its start on a retraction
(SGLang computes the value after a retraction from the batch; the start value is our simplification).
"""

from __future__ import annotations

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED, BATCH_CAP, NO_BLOCKS
from bros_ref.scheduler.queues import PriorityQueue, by_class_and_arrival

INITIAL_NEW_TOKEN_RATIO = 0.7
MIN_NEW_TOKEN_RATIO = 0.1
DECAY_STEPS = 600


class SGLangPriorityScheduler(Scheduler):
    """Static priority, prefill first, retraction of BE when slots are full."""

    def setup(self) -> None:
        self._waiting = PriorityQueue()
        self._new_token_ratio = INITIAL_NEW_TOKEN_RATIO

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        self._waiting.push(request)

    def dequeue(self, request: Request) -> None:
        self._waiting.pop()

    def pack(self, now_s: float) -> None:
        started = list(self.running)
        for request in started:  # a prefill that an earlier chunk began goes on first
            if request.num_tokens - request.num_computed_tokens > 1:
                self.try_admit(request)
        self._admit_newcomers()
        if self.output.requests:
            return
        decay = (INITIAL_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / DECAY_STEPS
        self._new_token_ratio = max(MIN_NEW_TOKEN_RATIO, self._new_token_ratio - decay)
        for request in started:
            self.try_admit(request)

    def _admit_newcomers(self) -> None:
        while request := self._waiting.head():
            if len(self.running) >= self.max_batch_size and not (request.is_rt and self._retract_for_slot()):
                self.refuse(request, BATCH_CAP)
                return
            if not self._memory_suffices(request):
                self.refuse(request, NO_BLOCKS)
                return
            if self.try_admit(request) is not ADMITTED:
                return

    def _memory_suffices(self, request: Request) -> bool:
        """Whether there are blocks for the prompt and for the expected future tokens of all running requests."""
        future_tokens = sum(other.max_total_tokens - other.num_tokens for other in self.running)
        wanted = self.kv.blocks_for(request.num_tokens + 1 + int(self._new_token_ratio * future_tokens))
        return wanted <= self.kv.num_free_blocks or not self.running

    def _retract_for_slot(self) -> bool:
        victims = [other for other in self.running if not other.is_rt and other.last_step < self.step]
        if victims:
            self.recompute(max(victims, key=by_class_and_arrival))
        return bool(victims)

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        if request.status is RequestStatus.WAITING:
            return False
        victim = min(self.running, key=lambda other: (len(other.output_token_ids), -other.num_prompt_tokens))
        self.recompute(victim)
        self._new_token_ratio = INITIAL_NEW_TOKEN_RATIO
        return victim is not request
