"""The last steps of a server, as a trace of bounded size that every widget opens.

A server runs for months, so steps are forgotten once there are more than `max_steps`, and requests once no kept step
names them. What the forgotten steps left behind (who holds which block, how much of it is on the host) is folded into
an *opening* step with which each cut begins, so a replay of the cut shows the true pool from its first step on.

In a cut, a request that was there before it began counts as arrived when it began: read latencies from `/metrics`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from bros_ref.trace.records import RequestRecord, StepRecord
from bros_ref.trace.trace import Trace


@dataclass
class _Held:
    """What a request has in the cache after the forgotten steps."""

    num_slots: int = 0
    num_emitted: int = 0
    table: dict[int, int] = field(default_factory=dict)  # logical index -> block id
    offloaded: dict[int, int] = field(default_factory=dict)  # logical index -> newest tokens on the host only


class RecentTrace(Trace):
    """A trace that keeps its last `max_steps` steps. The engine's thread appends, any thread may `cut`.

    Args:
        on_step: called with each step, the slots that were overwritten in it, and class and waiting time of the
            requests that ran for the first time.
    """

    def __init__(self, header: Trace, max_steps: int = 20_000,
                 on_step: Callable[[StepRecord, int, list[tuple[str, float]]], None] | None = None) -> None:
        super().__init__(header.policy, header.model, header.device, header.num_blocks, header.block_size,
                         header.slot_bytes, header.seed, header.environment)
        self._max_steps, self._on_step = max_steps, on_step
        self._kept: deque[StepRecord] = deque()
        self._before: dict[str, _Held] = {}  # after the forgotten steps
        self._now: dict[str, dict[int, int]] = {}  # of each request, tokens of each block that are on the host only
        self._ran: set[str] = set()
        self._ends: deque[tuple[int, str]] = deque()  # (number of the step after which it had ended, request id)
        self._ended_seen = 0
        self._lock = threading.Lock()

    def append(self, step: StepRecord) -> None:
        """Keeps a step and forgets the oldest; O(what the step changed)."""
        with self._lock:
            overwritten, began = self._overwritten(step), self._began(step)
            self._kept.append(step)
            for request_id in step.finished:
                self._ends.append((step.step, request_id))
            for request_id in list(self.ended_outside)[self._ended_seen:]:
                self._ends.append((step.step, request_id))
            self._ended_seen = len(self.ended_outside)
            for request_id in self.rejected:
                self.requests.pop(request_id, None)
            self.rejected.clear()
            while len(self._kept) > self._max_steps:
                _fold(self._before, self._kept.popleft())
                self._forget_ended()
        if self._on_step is not None:
            self._on_step(step, overwritten, began)

    def cut(self, seconds: float) -> Trace:
        """The steps of the last `seconds` as a trace of its own, at least one if there is any."""
        with self._lock:
            kept, requests = list(self._kept), dict(self.requests)
            held = {name: replace(one, table=dict(one.table), offloaded=dict(one.offloaded))
                    for name, one in self._before.items()}
            outside = dict(self.ended_outside)
        trace = Trace(self.policy, self.model, self.device, self.num_blocks, self.block_size, self.slot_bytes,
                      self.seed, self.environment)
        if not kept:
            return trace
        start_s = min(kept[-1].end_s - seconds, kept[-1].start_s)
        first = next(index for index, step in enumerate(kept) if step.end_s > start_s or step is kept[-1])
        gone = {name for name, (time_s, _) in outside.items() if float(time_s) <= kept[first].start_s}
        for step in kept[:first]:
            _fold(held, step)
            gone.update(step.finished)
        steps = kept[first:]
        trace.requests = {name: _arrived(record, steps[0].start_s) for name, record in requests.items()
                          if name not in gone}
        trace.steps = [_opening(steps[0], {name: one for name, one in held.items() if name in trace.requests}),
                       *(_only(step, trace.requests) for step in steps)]
        trace.ended_outside = {name: end for name, end in outside.items() if name in trace.requests}
        return trace

    def _overwritten(self, step: StepRecord) -> int:
        """Tokens that lost their slot in this step, those of requests that were swapped out whole left out."""
        total = 0
        for request_id, index, num_offloaded in step.offloaded:
            lost = self._now.setdefault(request_id, {})
            if request_id not in step.preempted:
                total += max(0, num_offloaded - lost.get(index, 0))
            lost[index] = num_offloaded
        for request_id, index, _ in step.block_changes:
            if index < 0:
                self._now.pop(request_id, None)
        return total

    def _began(self, step: StepRecord) -> list[tuple[str, float]]:
        new = step.scheduled.keys() - self._ran
        self._ran |= new
        for request_id in step.finished:
            self._ran.discard(request_id)
        return [(self.requests[name].request_class, step.start_s - self.requests[name].arrival_s)
                for name in new if name in self.requests]

    def _forget_ended(self) -> None:
        oldest = self._kept[0].step
        while self._ends and self._ends[0][0] < oldest:
            _, request_id = self._ends.popleft()
            self.requests.pop(request_id, None)
            self._before.pop(request_id, None)
            self._now.pop(request_id, None)
            self._ran.discard(request_id)
            if self.ended_outside.pop(request_id, None) is not None:
                self._ended_seen -= 1


def _fold(held: dict[str, _Held], step: StepRecord) -> None:
    """Adds what a step changed; the same rules as `trace/replay.py`."""
    for request_id, index, num_offloaded in step.offloaded:
        held.setdefault(request_id, _Held()).offloaded[index] = num_offloaded
    for request_id, index, block_id in step.block_changes:
        if index < 0:  # perhaps of a request that has ended
            if (one := held.get(request_id)) is not None:
                one.table, one.offloaded, one.num_slots = {}, {}, 0
        elif block_id < 0:
            held[request_id].table.pop(index, None)
        else:
            held.setdefault(request_id, _Held()).table[index] = block_id
    for request_id, num_tokens in step.scheduled.items():
        held.setdefault(request_id, _Held()).num_slots += num_tokens
    for request_id in step.emitted:
        held.setdefault(request_id, _Held()).num_emitted += 1
    for request_id in step.finished:
        held.pop(request_id, None)


def _opening(first: StepRecord, held: dict[str, _Held]) -> StepRecord:
    """A step of no duration that restores the state before the cut."""
    storing = {name: one for name, one in held.items() if one.num_slots}
    changes = [[name, index, block_id] for name, one in storing.items() for index, block_id in one.table.items()]
    return StepRecord(
        step=first.step - 1, start_s=first.start_s, duration_s=0.0, schedule_s=0.0, predicted_s=None,
        step_budget_s=None, binding=None, scheduled={name: one.num_slots for name, one in storing.items()},
        emitted=[name for name, one in held.items() for _ in range(one.num_emitted)], finished={}, preempted={},
        slack_s={}, left_out={}, num_behind=0, block_changes=[list(change) for change in changes],
        offloaded=[[name, index, lost] for name, one in storing.items() for index, lost in one.offloaded.items()
                   if lost],
        copied={"checkpoint": 0, "restore": 0, "relocate": 0}, recomputed_tokens=0, num_waiting=first.num_waiting,
        num_running=first.num_running, used_blocks=len({block_id for *_, block_id in changes}))


def _arrived(record: RequestRecord, start_s: float) -> RequestRecord:
    return record if record.arrival_s >= start_s else replace(record, arrival_s=start_s)


def _only(step: StepRecord, known: Collection[str]) -> StepRecord:
    """A step without the blocks that it took back from requests that ended before the cut."""
    if all(change[0] in known for change in (*step.block_changes, *step.offloaded)):
        return step
    return replace(step, block_changes=[change for change in step.block_changes if change[0] in known],
                   offloaded=[change for change in step.offloaded if change[0] in known])
