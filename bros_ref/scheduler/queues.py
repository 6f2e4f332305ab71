"""Two waiting queues. A request that ended while it waited stays in the queue and is skipped when it comes up, so an
abort costs O(1); invariant: a WAITING request is in exactly one queue, once."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import count, islice

from bros_ref.request import Request


def by_class_and_arrival(request: Request) -> tuple[bool, float]:
    """Static priority; smaller is more important: RT before BE, then arrival."""
    return (not request.is_rt, request.arrival_s)


class FIFOQueue:
    """First in, first out; a preempted request goes back to the front."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def push(self, request: Request, *, front: bool = False) -> None:
        if front:
            self._requests.appendleft(request)
        else:
            self._requests.append(request)

    def head(self) -> Request | None:
        """The next request, which stays in the queue."""
        while self._requests and self._requests[0].status.is_end:
            self._requests.popleft()
        return self._requests[0] if self._requests else None

    def first(self, num: int) -> list[Request]:
        """At most `num` requests from the front on, which stay in the queue."""
        return list(islice((request for request in self._requests if not request.status.is_end), num))

    def remove(self, request: Request) -> None:
        """Removes a request from anywhere in the queue; O(its position)."""
        self._requests.remove(request)

    def pop(self) -> None:
        """Drops the head."""
        self._requests.popleft()


class PriorityQueue:
    """Ordered by class, arrival and request id, as in vLLM: a preempted request returns to its former place."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[bool, float], str, int, Request]] = []
        self._ticket = count()  # an ended request may still be here when another one comes with its id

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (by_class_and_arrival(request), request.request_id, next(self._ticket), request))

    def head(self) -> Request | None:
        while self._heap and self._heap[0][3].status.is_end:
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def pop(self) -> None:
        heapq.heappop(self._heap)
