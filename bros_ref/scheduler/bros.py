"""BROS (paper, sections 2 and 3): dynamic priority and greedy packing, solved anew every iteration.

Maximise best-effort work, subject to: the predicted iteration fits the residual time of the most urgent RT (Eq. 6), at
most `seats` requests, and the blocks suffice (Eq. 8). Greedy, in this order (the order is the paper's):

    1. RT by ascending slack                              while the iteration stays within the tightest residual
    2. RT that are late already                           they no longer set the bound (our decision)
    3. BE by ascending KV to restore, less what waiting has earned          while it stays within that bound

Not being picked *is* preemption: the request keeps its KV and its slots may be shared or taken (`bidirectional.py`).

Slack = due - now - one average iteration, where `due` is the deadline less the iterations needed before the last one.
All candidates share "now" and the average, so *slack order is the order of `due`*, and sorting what is almost sorted
already is nearly free (the paper polls two sorted queues for the same reason).

Ours, where the paper is silent:
- An iteration is also short enough for a typical *new* RT, arriving as it starts, to meet its TTFT.
- The paper's step 3 (batch full: swap the slackest RT for a BE) happens before the seat is taken: seats fill in slack
  order, so the last seat is the slackest RT's; it is offered to BE if that RT can afford two iterations, and is the
  RT's again if no BE can take it.
- **BE never starves.** A BE that holds KV and has not run for N = `be_max_wait_steps` steps is *due*: one a step, the
  longest-waiting, is offered the last seat, goes before all other BE and is exempt from the deadline bound and the
  token budget. So with S BE holding KV it runs within N + S steps, unless RT hold so much of the pool that its own KV
  cannot be put there (then it keeps no seat empty). If no BE holds KV, the head of the BE queue is due after N steps.
  Newcomers are admitted in order of arrival. Of the late RT that have waited N steps, one a step is exempt likewise.
- A batch that is still empty takes its first request whatever the bound: an idle machine helps nobody.

`bros-plus` is this class with four rules changed (ours; `scheduler/__init__.py` names them, each alone is a policy):

- Prompts are cut to what the deadlines leave, where the paper's form leaves a long BE prompt out until no RT is near.
- No cap bounds the batch besides the deadlines.
- An RT banks the time it is ahead: TPOT is a mean, so token k is due at first token + k * TPOT (nine tenths of it), if
  that is later than the paper's last token + TPOT. Whoever is ahead can sit out for a burst of others, and be on time.
- RT displace RT as late as they can. In the paper's form whoever comes first in slack order takes blocks from the one
  with the most slack; where RT alone fill the pool, that order changes with every token, and whole requests cross PCIe
  in every step. Here an RT that was swapped out comes back at the cost of another only when it cannot wait two more
  iterations, and one that has not started displaces only RT that can wait as long as its TTFT.
"""

from __future__ import annotations

import math
from bisect import insort
from itertools import chain
from operator import attrgetter

from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED, BATCH_CAP, DEADLINE, NO_BLOCKS
from bros_ref.scheduler.queues import FIFOQueue

by_due = attrgetter("due_s")
WAITING, RUNNING = RequestStatus.WAITING, RequestStatus.RUNNING
TYPICAL_RT_EMA = 0.1  # weight of the newest RT in the picture of a typical one


class BROSScheduler(Scheduler):
    """Dynamic priority with greedy packing; the ablations run this class on other KV managers."""

    def setup(self) -> None:
        self._rt_waiting: list[Request] = []  # sorted by due_s
        self._rt_late = FIFOQueue()  # waiting, and past saving: once late, always late
        self._be_waiting = FIFOQueue()
        self._be_order: list[Request] = []  # BE that hold KV, the first to run first, the first to preempt last
        self._starving_be: Request | None = None  # the longest-waiting, until it was offered a place in this step
        self._batch_cap = min(self.config.base_batch_cap, self.config.max_num_seqs)
        self._deadline_bound = False  # whether a deadline kept somebody out of the last batch
        self._typical_prompt_tokens = 0.0
        self._typical_ttft_s = math.inf

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        if not request.is_rt:
            self._be_waiting.push(request, front=front)
            return
        self.prefill_advanced(request)
        insort(self._rt_waiting, request, key=by_due)
        if request.slo is not None and not front:
            known = self._typical_ttft_s < math.inf
            weight = TYPICAL_RT_EMA if known else 1.0
            self._typical_ttft_s = request.slo.ttft_s if not known else (
                self._typical_ttft_s + weight * (request.slo.ttft_s - self._typical_ttft_s))
            self._typical_prompt_tokens += weight * (request.num_prompt_tokens - self._typical_prompt_tokens)

    def dequeue(self, request: Request) -> None:
        if not request.is_rt:
            self._be_waiting.pop()
        elif request is self._rt_late.head():
            self._rt_late.pop()
        else:
            self._rt_waiting.remove(request)  # at or near the front

    # -- the algorithm ----------------------------------------------------------------------------------------

    def pack(self, now_s: float) -> None:
        """Greedy packing (paper, Algorithm 1): who is admitted, in which order, within which step budget."""
        requests, slack_s, try_admit = self.output.requests, self.output.slack_s, self.try_admit
        last_seat, be_exists = self.max_batch_size - 1, bool(self._be_order or self._be_waiting.head())
        step_budget_s, patience_s = math.inf, 2 * self.iteration_s * self.latency.safety
        late, aside, rt_queue_open, be_queue_open = list[Request](), None, True, True

        # 1. Urgent RT, by ascending slack [paper]. The residual time of the most urgent bounds the step (Eq. 6).
        for request in self._rt_by_slack(now_s):
            if not rt_queue_open and request.status is WAITING:
                continue
            residual_s = request.due_s - now_s
            slack_s[request.request_id] = residual_s - self.iteration_s
            if residual_s < self._alone_s(request):
                late.append(request)
                continue
            step_budget_s = min(step_budget_s, residual_s)
            if be_exists and len(requests) == last_seat:
                self._admit_starving_be(step_budget_s)
                if 0 < len(requests) == last_seat and residual_s > patience_s:
                    aside = request  # the slackest RT leaves the last seat to BE [paper] if it can wait two steps
                    self.refuse(aside, BATCH_CAP)
                    break
            admission = try_admit(request, step_budget_s)
            if admission is BATCH_CAP:
                return
            if admission is not ADMITTED:
                self._deadline_bound |= admission is DEADLINE
                rt_queue_open &= request.status is RUNNING  # else the rest of the queue stands behind it

        # 2. Late RT (our decision). They set no bound; one that has waited too long is exempt from the budget.
        exempt_left = 1
        for request in chain(late, self._rt_late.first(self.max_batch_size)):
            slack_s[request.request_id] = request.due_s - now_s - self.iteration_s
            if len(requests) == last_seat:
                self._admit_starving_be(step_budget_s)
            exempt = exempt_left > 0 and self.step - request.last_step > self.config.be_max_wait_steps
            exempt_left -= exempt
            admission = try_admit(request, step_budget_s, exempt)
            if admission is BATCH_CAP:
                return
            if admission is not ADMITTED and request.status is WAITING and request not in late:
                break

        # 3. A starving BE (our decision), exempt from the budget, which now has to leave time for an RT that arrives.
        rt_budget_s, step_budget_s = step_budget_s, min(step_budget_s, self._newcomer_budget_s())
        self._admit_starving_be(step_budget_s)

        # 4. Pending BE, by ascending KV to restore [paper].
        for request in self._be_order:
            if request.last_step == self.step:  # it was starving
                continue
            admission = try_admit(request, step_budget_s, not requests)
            if admission is BATCH_CAP:
                return
            if admission is DEADLINE:
                self._deadline_bound = True
                if not self._a_decode_fits(step_budget_s):
                    be_queue_open = False
                    break
            elif admission is NO_BLOCKS:
                be_queue_open = False

        # 5. New BE, in order of arrival.
        while be_queue_open and (newcomer := self._be_waiting.head()):
            be_queue_open = try_admit(newcomer, step_budget_s, not requests) is ADMITTED

        # 6. The last seat: if no BE could use it, the RT that stood aside takes it after all.
        if aside is not None and len(requests) == last_seat:
            try_admit(aside, rt_budget_s)

    # -- the step's order and limits --------------------------------------------------------------------------

    def begin_step(self) -> None:
        self._adapt_batch_cap()
        self.running.sort(key=by_due)  # RT by slack; BE are never due (infinity) and keep their order, at the end
        self._be_order = self._sorted_be()
        self.kv.begin_step(self._be_order)

    def _adapt_batch_cap(self) -> None:
        """TCP slow start (paper): double while no RT deadline binds, back to the base at once when one does."""
        base, ceiling = min(self.config.base_batch_cap, self.config.max_num_seqs), self.config.max_num_seqs
        self._batch_cap = base if self._deadline_bound else min(2 * self._batch_cap, ceiling)
        self._deadline_bound = False
        self.max_batch_size = self._batch_cap if self.config.batch_slow_start else ceiling

    # -- real-time --------------------------------------------------------------------------------------------

    def _rt_by_slack(self, now_s: float) -> list[Request]:
        """RT that hold KV, and newcomers, by ascending slack. Both are sorted already; sorting one after the other is
        a merge, in linear time."""
        pending = [request for request in self.running if request.is_rt]
        if newcomers := self._newcomers_on_time(now_s):
            pending += newcomers
            pending.sort(key=by_due)
        return pending

    def _newcomers_on_time(self, now_s: float) -> list[Request]:
        """The first of the RT queue, at most as many as a batch holds. Those that can no longer meet their deadline
        move to `_rt_late`, for good, so that a burst of late ones hides nobody who can still be on time."""
        waiting, num_seen = self._rt_waiting, 0
        on_time: list[Request] = []
        for request in waiting:
            if len(on_time) == self.max_batch_size:
                break
            num_seen += 1
            if request.status.is_end:
                continue
            if request.due_s - now_s < self._alone_s(request):
                self._rt_late.push(request)
            else:
                on_time.append(request)
        if len(on_time) < num_seen:
            waiting[:num_seen] = on_time
        return on_time

    def _alone_s(self, request: Request) -> float:
        """The shortest iteration that gets this request its next token (or chunk)."""
        latency, context, offloaded = self.latency, request.num_computed_tokens, self.kv.offloaded_tokens
        if request.num_tokens - context == 1:
            executing_s = latency.c0 + latency.c1 + latency.c3 * context
        else:
            executing_s = latency.c0 + latency.cost_s(self._next_chunk(request), context)
        if request.request_id in offloaded:
            executing_s = max(executing_s, latency.restore_s_per_token * offloaded[request.request_id])
        return executing_s * latency.safety

    def _next_chunk(self, request: Request) -> int:
        left = request.num_tokens - request.num_computed_tokens
        return min(left, self.config.max_num_batched_tokens) if self.config.chunked_prefill else left

    def prefill_advanced(self, request: Request) -> None:
        """A prefill in k chunks must end by the deadline, so its next chunk is due k - 1 iterations earlier."""
        if not request.is_rt:
            return
        left = request.num_tokens - request.num_computed_tokens
        chunks = -(-left // self.config.max_num_batched_tokens) if self.config.chunked_prefill else 1
        request.due_s = request.deadline_s - (chunks - 1) * self.iteration_s

    # -- best-effort ------------------------------------------------------------------------------------------

    def _sorted_be(self) -> list[Request]:
        """BE that hold KV, by (tokens to restore - aging * steps waited); a starving one goes to the very front."""
        order = [request for request in self.running if not request.is_rt]
        order.sort(key=attrgetter("last_step"))
        oldest = order[0] if order else self._be_waiting.head()
        offloaded, step, aging = self.kv.offloaded_tokens, self.step, self.config.be_aging_tokens_per_step
        if offloaded:  # else the sort above has said it all
            order.sort(key=lambda request: offloaded.get(request.request_id, 0) - aging * (step - request.last_step))
        self._starving_be = None
        if oldest is not None and step - oldest.last_step > self.config.be_max_wait_steps:
            self._starving_be = oldest
            if order:
                order.remove(oldest)
                order.insert(0, oldest)
        return order

    def _admit_starving_be(self, step_budget_s: float) -> None:
        """Offers the starving BE a place, once per step. If it cannot be placed, nothing is kept from those after it.
        """
        if self._starving_be is not None:
            self.try_admit(self._starving_be, step_budget_s, exempt=True)
            self._starving_be = None

    def _newcomer_budget_s(self) -> float:
        """The iteration after which a typical RT that arrives right now can still make its TTFT; no bound if even
        the shortest iteration would not do."""
        latency, prompt_tokens = self.latency, int(self._typical_prompt_tokens)
        own_s = (latency.c0 + latency.cost_s(max(prompt_tokens, 1), 0)) * latency.safety
        left_s = self._typical_ttft_s - own_s
        return left_s if left_s > (latency.c0 + latency.c1) * latency.safety else math.inf

    def _a_decode_fits(self, step_budget_s: float) -> bool:
        soonest_s = (self.latency.predict(self.output.features) + self.latency.c1) * self.latency.safety
        return soonest_s <= step_budget_s

    # -- shortage ---------------------------------------------------------------------------------------------

    def can_admit(self, request: Request) -> bool:
        """An RT takes room from BE, and a due BE from other BE; the rest need empty blocks for the whole prompt."""
        return request.is_rt or request is self._starving_be or super().can_admit(request)

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        """BE: swap out blocks of BE ordered after it. RT, and BE if the host store is full: recompute the BE ordered
        last. The last resort for an RT is to swap out (else recompute) an RT that is less urgent."""
        if not request.is_rt:
            if request.status is WAITING and request is not self._starving_be:
                return False  # a newcomer displaces nobody
            if self.kv.reclaim(request, num_new_tokens):
                return True
        victim = self._last_idle_be(request)
        if victim is not None:
            self.recompute(victim)
            return True
        victim = self._least_urgent_rt(request) if request.is_rt else None
        if victim is None:
            return False
        if self.kv.swap_out(victim.request_id):
            self.output.preempted[victim.request_id] = "swap"
        else:
            self.recompute(victim)
        return True

    def _last_idle_be(self, request: Request) -> Request | None:
        """The last BE in order that has blocks to give; None once `request` itself is reached."""
        for other in reversed(self._be_order):
            if other is request:
                return None
            if self._can_give(other) and self.kv.frees_blocks_for(other.request_id, request.request_id):
                return other
        return None

    def _least_urgent_rt(self, request: Request) -> Request | None:
        """The idle RT to give way to `request`: one that is late already, else the one with the latest deadline.

        Not by `due_s`, which a prefill moves back with every chunk: two prompts that do not fit together would take
        the blocks from one another for ever, whoever has just advanced giving way.
        """
        now_s = self.output.now_s

        def rank(rt: Request) -> tuple[bool, float, float, str]:  # total: of any two, one must give way
            return (rt.due_s - now_s < self._alone_s(rt), rt.deadline_s, rt.arrival_s, rt.request_id)

        spared_s = -math.inf
        if not self.config.rt_displaces_eagerly:
            if request.request_id in self.kv.offloaded_tokens and self._can_wait(request):
                return None
            if request.status is WAITING and request.slo is not None:
                spared_s = request.slo.ttft_s
        idle = [other for other in self.running
                if other.is_rt and other.due_s - now_s > spared_s and self._can_give(other)]
        victim = max(idle, key=rank, default=None)
        return victim if victim is not None and rank(victim) > rank(request) else None

    def _can_wait(self, request: Request) -> bool:
        """Whether it is on time still if it sits out two iterations."""
        soonest_s = 2 * self.iteration_s * self.latency.safety + self._alone_s(request)
        return request.due_s - self.output.now_s > soonest_s

    def _can_give(self, other: Request) -> bool:
        """Holds blocks, and sits out this step."""
        return (other.status is RUNNING and other.last_step < self.step
                and self.kv.num_device_blocks(other.request_id) > 0)
