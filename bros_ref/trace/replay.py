"""Runs a trace again, step by step, to say what it does not store: who owned each slot, who was doing what.

It depends on the records of `trace.py` only: no scheduler, no cache. The rules it replays are those of
`StepRecord`: table changes come in the order they happened, a request's length is the sum of its scheduled tokens
since its table was last dropped, block i of a table holds tokens i*B to i*B + B - 1, and where a step both moves
tokens of a request to the host and drops its table, it moved them first. Invariant: the work is proportional to what
changed, never to steps x blocks or steps x requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from bros_ref.kv_cache.blocks import BlockView
from bros_ref.trace.records import DECODE, PENDING, PREFILL, RESTORING, WAITING, PhaseSpan, SlotCopies, StepRecord

if TYPE_CHECKING:
    from bros_ref.trace.trace import Trace

Owner = tuple[str, int]  # request id, logical index of the block in its table


def replay_pools(trace: Trace) -> Iterator[list[BlockView]]:
    """See `Trace.pools`. Each list is the caller's; the views in it are shared with the lists before and after."""
    pool = _Pool(trace)
    for step in trace.steps:
        pool.apply(step)
        yield list(pool.views)


def replay_changes(trace: Trace) -> Iterator[dict[int, BlockView]]:
    """See `Trace.pool_changes`."""
    pool = _Pool(trace)
    for step in trace.steps:
        yield {block_id: pool.views[block_id] for block_id in sorted(pool.apply(step))}


def replay_copies(trace: Trace) -> Iterator[list[SlotCopies]]:
    """See `Trace.copies`."""
    pool = _Pool(trace)
    for step in trace.steps:
        yield pool.copies(step)
        pool.apply(step)


class _Pool:
    """Block tables, lengths and losses of all requests, and the blocks seen from the other side."""

    def __init__(self, trace: Trace) -> None:
        self.block_size = trace.block_size
        self.views = [BlockView() for _ in range(trace.num_blocks)]
        self._is_rt = {request_id: record.request_class == "rt" for request_id, record in trace.requests.items()}
        self._tables: defaultdict[str, dict[int, int]] = defaultdict(dict)  # logical index -> block id
        self._num_slots: defaultdict[str, int] = defaultdict(int)
        self._offloaded: defaultdict[str, dict[int, int]] = defaultdict(dict)
        self._rt_owners: dict[int, Owner] = {}
        self._be_owners: dict[int, Owner] = {}

    def apply(self, step: StepRecord) -> set[int]:
        """One step forward; only the blocks it touched, whose ids it returns, get a new view."""
        touched: set[int] = set()
        for request_id, index, num_offloaded in step.offloaded:
            self._offloaded[request_id][index] = num_offloaded
        for request_id, index, block_id in step.block_changes:
            if index < 0:
                touched.update(self._drop(request_id))
                continue
            if not -1 <= block_id < len(self.views):
                raise ValueError(f"step {step.step}: request {request_id!r} is given block {block_id}, but the pool "
                                 f"has blocks 0 to {len(self.views) - 1}")
            touched.update(self._release(request_id, index))
            if block_id >= 0:
                self._tables[request_id][index] = block_id
                self._owners(request_id)[block_id] = (request_id, index)
                touched.add(block_id)
        for request_id, num_tokens in step.scheduled.items():
            first = self._num_slots[request_id]
            self._num_slots[request_id] = first + num_tokens
            indices = range(first // self.block_size, (first + num_tokens - 1) // self.block_size + 1)
            touched.update(self._blocks(request_id, indices))
        for request_id, index, _ in step.offloaded:
            touched.update(self._blocks(request_id, (index,)))
        for block_id in touched:
            self.views[block_id] = self._view(block_id)
        return touched

    def copies(self, step: StepRecord) -> list[SlotCopies]:
        """What a step copies, worked out before it is applied.

        In one step the offloaded tokens of a block rise, then fall to none at most once, because a request that has
        run in a step is not preempted in it. So tokens are saved from the block held before the step, restored to the
        block held after it, and the survivors move from one to the other in between.
        """
        made, returning, now = [], [], dict[Owner, int]()
        offloaded: dict[Owner, int] = {}
        for request_id, index, num_offloaded in step.offloaded:
            owner = (request_id, index)
            before = offloaded.setdefault(owner, self._offloaded[request_id].get(index, 0))
            if num_offloaded > before:
                offloaded[owner] = num_offloaded
                made.append(self._run("checkpoint", owner, self._tables[request_id][index], num_offloaded, before))
            else:
                returning.append(owner)
        for request_id, index, block_id in step.block_changes:
            if index < 0:
                now.update(((request_id, i), -1) for i in self._tables[request_id])
                continue
            owner = (request_id, index)
            if block_id >= 0 and now.get(owner, self._tables[request_id].get(index, -1)) >= 0:
                gone = offloaded.get(owner, self._offloaded[request_id].get(index, 0))
                made.append(self._run("relocate", owner, block_id, self._fill(owner), gone))
            now[owner] = block_id
        for owner in returning:
            block_id = now.get(owner, self._tables[owner[0]].get(owner[1], -1))
            made.append(self._run("restore", owner, block_id, offloaded[owner], 0))
        return made

    def _run(self, kind: str, owner: Owner, block_id: int, from_newest: int, to_newest: int) -> SlotCopies:
        """The slots of the newest `from_newest` tokens of a logical block, but for the newest `to_newest`."""
        count, newest = from_newest - to_newest, self._fill(owner) - to_newest
        first = newest - count if self._is_rt[owner[0]] else self.block_size - newest
        return SlotCopies(kind, owner[0], block_id, first, count)

    def _owners(self, request_id: str) -> dict[int, Owner]:
        return self._rt_owners if self._is_rt[request_id] else self._be_owners

    def _blocks(self, request_id: str, indices: Iterable[int]) -> list[int]:
        table = self._tables[request_id]
        return [table[index] for index in indices if index in table]

    def _release(self, request_id: str, index: int) -> list[int]:
        """Removes one entry of a table; if the block already has a new owner of this class, that owner stays."""
        block_id = self._tables[request_id].pop(index, None)
        if block_id is None:
            return []
        owners = self._owners(request_id)
        if owners.get(block_id) == (request_id, index):
            del owners[block_id]
        return [block_id]

    def _drop(self, request_id: str) -> list[int]:
        self._num_slots.pop(request_id, None)
        self._offloaded.pop(request_id, None)
        return [block_id for index in list(self._tables[request_id]) for block_id in self._release(request_id, index)]

    def _fill(self, owner: Owner) -> int:
        request_id, index = owner
        return max(0, min(self.block_size, self._num_slots[request_id] - index * self.block_size))

    def _view(self, block_id: int) -> BlockView:
        view = BlockView()
        if (rt := self._rt_owners.get(block_id)) is not None:
            view.rt_owner, view.rt_index, view.rt_fill = rt[0], rt[1], self._fill(rt)
        if (be := self._be_owners.get(block_id)) is not None:
            view.be_owner, view.be_index, view.be_fill = be[0], be[1], self._fill(be)
            view.overwritten = self._offloaded[be[0]].get(be[1], 0)
        return view


def replay_phases(trace: Trace) -> dict[str, list[PhaseSpan]]:
    """See `Trace.phases`."""
    lives = {request_id: _Life(record.arrival_s, record.prompt_tokens)
             for request_id, record in trace.requests.items() if request_id not in trace.rejected}
    outside = sorted((float(end[0]), request_id) for request_id, end in trace.ended_outside.items())
    ran_last: set[str] = set()
    for step in trace.steps:
        while outside and outside[0][0] <= step.start_s:
            time_s, request_id = outside.pop(0)
            lives[request_id].end(time_s)
        # 1. What moved between device and host; then dropped tables, which make "pending" into "waiting".
        restoring = {request_id for request_id, index, num_offloaded in step.offloaded
                     if lives[request_id].set_offloaded(index, num_offloaded)}
        dropped = {request_id for request_id, index, _ in step.block_changes if index < 0}
        for request_id in dropped:
            lives[request_id].drop()
        # 2. Who stopped running, and who lost its KV while it sat out.
        for request_id in (ran_last | dropped) - step.scheduled.keys():
            lives[request_id].sit_out(step.start_s)
        # 3. Who runs.
        for request_id, num_tokens in step.scheduled.items():
            lives[request_id].run(step.start_s, num_tokens, request_id in restoring)
        for request_id in step.emitted:
            lives[request_id].num_emitted += 1
        for request_id in step.finished:
            lives[request_id].end(step.end_s)
        ran_last = set(step.scheduled)
    for time_s, request_id in outside:
        lives[request_id].end(time_s)
    end_s = trace.end_s
    for life in lives.values():
        life.end(end_s)
    return {request_id: life.spans for request_id, life in lives.items()}


class _Life:
    """One request's spans so far. The last one is open until the next phase, or the end, closes it."""

    def __init__(self, arrival_s: float, prompt_tokens: int) -> None:
        self.spans = [PhaseSpan(WAITING, arrival_s, arrival_s)]
        self.num_emitted = 0
        self._prompt_tokens = prompt_tokens
        self._num_slots = 0
        self._offloaded: dict[int, int] = {}
        self._ended = False

    def drop(self) -> None:
        self._num_slots = 0
        self._offloaded.clear()

    def set_offloaded(self, index: int, num_offloaded: int) -> bool:
        """Records how many tokens of a block are on the host only; True if there are fewer than before: a restore."""
        before = self._offloaded.get(index, 0)
        self._offloaded[index] = num_offloaded
        return num_offloaded < before

    def sit_out(self, time_s: float) -> None:
        self._switch(PENDING if self._num_slots else WAITING, time_s)

    def run(self, time_s: float, num_tokens: int, is_restoring: bool) -> None:
        known_before = self._prompt_tokens + self.num_emitted - 1
        is_decode = self.num_emitted > 0 and self._num_slots == known_before
        self._switch(RESTORING if is_restoring else DECODE if is_decode else PREFILL, time_s)
        self._num_slots += num_tokens
        self.spans[-1].steps += 1
        self.spans[-1].tokens += num_tokens

    def end(self, time_s: float) -> None:
        if self._ended:
            return
        self._close(time_s)
        self._ended = True

    def _switch(self, phase: str, time_s: float) -> None:
        if self._ended or self.spans[-1].phase == phase:
            return
        self._close(time_s)
        self.spans.append(PhaseSpan(phase, time_s, time_s))

    def _close(self, time_s: float) -> None:
        """Ends the open span; one that took no time and ran in no step is dropped."""
        last = self.spans[-1]
        last.end_s = max(time_s, last.start_s)
        if last.steps == 0 and last.end_s == last.start_s:
            self.spans.pop()
