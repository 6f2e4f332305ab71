"""BROS (paper, sections 2 and 3): dynamic priority and greedy packing, solved anew every iteration.

Maximise best-effort work, subject to: the predicted iteration fits the residual time of the most urgent RT (Eq. 6), the
batch has room (B_max), and the blocks suffice (Eq. 8). `BROSScheduler.pack` is the greedy answer, in numbered stages.
Not being admitted *is* preemption: the request keeps its KV, and its slots may be shared or taken (`bidirectional.py`).

Slack = deadline - now - one average iteration. All requests share "now" and the average, so *the order by slack is the
order by deadline*. Sorting what is almost sorted is nearly free (the paper polls two sorted queues for this reason).

Ours, where the paper is silent or where measurements gave a reason to differ:

- An RT is *late* if even its whole remaining prefill, run alone, would miss the deadline. It does not bound the step,
  and comes after the RT that can be on time but before BE, so it may also take a seat that an RT on time has left.
- The step budget leaves time for a typical *new* RT that arrives as the step starts. An empty batch may exceed every
  budget, so the machine never idles. An RT without blocks does not bound the step, for it cannot run in it.
- The paper fills the batch, and then swaps its slackest RT for a BE. Here seats fill in slack order, so the RT whose
  turn is the last seat is the slackest. It stands aside if it can wait two steps, and takes the seat if no BE can.
- The last resort for an RT without blocks is to swap out RT (paper); BE or RT are recomputed if the host store is full.
- **BE never starves.** A BE that holds KV and has not run for N = `be_max_wait_steps` steps is *starving*. Each step,
  starving BE are offered a place before all other BE, the longest-waiting first, until one of them is admitted: a seat
  is kept for it, it is exempt from the budgets of time and tokens, and it may take the blocks of all other BE. So it
  runs at the latest in the S-th step in which its KV fits beside that of RT, where S is the number of BE that held KV
  when it began to starve. If no BE holds KV, the head of the BE queue is offered the place after N steps.
  Of the late RT that have waited N steps, at most one per step is exempt from the budgets likewise.
- `rt_slowdown` bounds how much BE may slow RT down (`_slowed_s`).

`bros-plus` is this class with six rules changed (ours; `scheduler/__init__.py` names them, each alone is a policy):

- Prompts are cut to what the deadlines leave. In the paper's form a long BE prompt waits until no RT is near, and long
  RT prompts delay each other: where RT prompts have thousands of tokens, use `bros-plus`.
- No cap bounds the batch besides the deadlines.
- An RT banks the time it is ahead: TPOT is a mean, so token k is due at first token + k * TPOT (nine tenths of it), if
  that is later than the paper's last token + TPOT. An RT that is ahead can sit out for others, and still be on time.
- When not all RT can be on time, as many as possible are (`_triage`). In the order by slack, a prompt that barely
  misses its deadline also makes those behind it late. RT that are given up come next, before late RT and before BE.
- RT displace RT as late as they can. In the paper's form the RT that comes first in slack order takes blocks from the
  one with the most slack; where RT alone fill the pool, that order changes with every token, and whole requests cross
  PCIe in every step. Here an RT that was swapped out comes back at the cost of another only when it cannot wait two
  more iterations, and one that has not started displaces only RT that can wait as long as its TTFT.
- RT that have time leave a step's tokens to BE that decode (`_tokens_left_to_be`), which long RT prompts else take.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from heapq import heappop, heappush
from itertools import chain, takewhile
from operator import attrgetter

from bros_ref.config import cdiv
from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import ADMITTED, BATCH_CAP, DEADLINE, NO_BLOCKS
from bros_ref.scheduler.queues import FIFOQueue

by_deadline, by_last_step = attrgetter("deadline_s"), attrgetter("last_step")
WAITING, RUNNING = RequestStatus.WAITING, RequestStatus.RUNNING
TYPICAL_RT_EMA = 0.1  # weight of the newest RT in the picture of a typical one


class BROSScheduler(Scheduler):
    """Dynamic priority with greedy packing; the ablations run this class on other KV managers."""

    def setup(self) -> None:
        self._rt_waiting: list[Request] = []  # sorted by deadline
        self._rt_late = FIFOQueue()  # waiting, and past saving: once late, always late
        self._be_waiting = FIFOQueue()
        self._be_order: list[Request] = []  # BE that hold KV, the first to run first, the first to preempt last
        self._rt_by_rank: list[Request] | None = None  # that can give up KV, the first to do so first
        self._starving_be: list[Request] = []  # the longest-waiting first, until they were offered a place in a step
        self._batch_cap = 0
        self._typical_prompt_tokens = 0.0
        self._typical_ttft_s = math.inf

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        if not request.is_rt:
            self._be_waiting.push(request, front=front)
            return
        insort(self._rt_waiting, request, key=by_deadline)
        if request.slo is not None and not front:
            ttft_s, typical_s = request.slo.ttft_s, self._typical_ttft_s
            weight = TYPICAL_RT_EMA if typical_s < math.inf else 1.0
            # A tighter target counts at once: a mean with loose targets would leave no time for those who need it.
            self._typical_ttft_s = ttft_s if ttft_s < typical_s else typical_s + weight * (ttft_s - typical_s)
            self._typical_prompt_tokens += weight * (request.num_prompt_tokens - self._typical_prompt_tokens)

    def dequeue(self, request: Request) -> None:
        if not request.is_rt:
            self._be_waiting.pop()
        elif request in self._rt_waiting:
            self._rt_waiting.remove(request)
        else:
            self._rt_late.remove(request)

    # -- the algorithm ----------------------------------------------------------------------------------------

    def pack(self, now_s: float) -> None:
        """Greedy packing (paper, Algorithm 1): who is admitted, in which order, within which step budget."""
        requests, try_admit = self.output.requests, self.try_admit
        last_seat, be_exists = self.max_batch_size - 1, bool(self._be_order or self._be_waiting.head())
        step_budget_s, patience_s = math.inf, 2 * self.iteration_s * self.latency.safety
        urgent, late = self._rt_by_slack(now_s)
        aside, rt_queue_open, be_queue_open = None, True, True
        self.max_step_tokens -= self._tokens_left_to_be(urgent, late, now_s)

        # 1. Urgent RT, by ascending slack [paper]. The residual time of the most urgent bounds the step (Eq. 6).
        for request in urgent:
            if not rt_queue_open and request.status is WAITING:
                continue
            residual_s = request.deadline_s - now_s
            if be_exists and len(requests) == last_seat:
                self._admit_starving_be(step_budget_s)
                if 0 < len(requests) == last_seat and residual_s > patience_s:
                    aside = request  # the slackest RT leaves the last seat to BE [paper] if it can wait two steps
                    self.refuse(aside, BATCH_CAP)
                    break
            bound_s = residual_s if residual_s < step_budget_s else step_budget_s
            admission = try_admit(request, bound_s)
            if admission is BATCH_CAP:
                return
            if admission is not NO_BLOCKS:  # else it cannot run, however short the step
                step_budget_s = bound_s
            if admission is not ADMITTED and request.status is WAITING:
                rt_queue_open = False  # the rest of the queue stands behind it

        # 2. Late RT (our decision). They set no bound; one that has waited too long is exempt from the budget.
        exempt_left, shortest_refused = 1, math.inf
        for request in chain(late, self._rt_late.first(self.max_batch_size)):
            if request.status is WAITING and request.num_tokens >= shortest_refused:
                continue
            if len(requests) == last_seat:
                self._admit_starving_be(step_budget_s)
            exempt = exempt_left > 0 and self.step - request.last_step > self.config.be_max_wait_steps
            admission = try_admit(request, step_budget_s, exempt)
            if admission is BATCH_CAP:
                return
            if admission is ADMITTED:
                exempt_left -= exempt
            elif request.status is WAITING:
                shortest_refused = min(shortest_refused, request.num_tokens)

        # 3. A starving BE (our decision), exempt from the budget, which now has to leave time for an RT that arrives.
        self.max_step_tokens = self.config.max_num_batched_tokens
        rt_budget_s, step_budget_s = step_budget_s, min(step_budget_s, self._newcomer_budget_s(), self._slowed_s())
        self._admit_starving_be(step_budget_s)

        # 4. Pending BE, by ascending KV to restore [paper].
        for request in self._be_order:
            if request.last_step == self.step:  # it was starving
                continue
            admission = try_admit(request, step_budget_s)
            if admission is BATCH_CAP:
                return
            be_queue_open &= admission is not NO_BLOCKS
            if admission is DEADLINE and not self._a_decode_fits(step_budget_s):
                be_queue_open = False
                break

        # 5. New BE, in order of arrival.
        while be_queue_open and (newcomer := self._be_waiting.head()):
            be_queue_open = try_admit(newcomer, step_budget_s) is ADMITTED

        # 6. The last seat: if no BE could use it, the RT that stood aside takes it after all.
        if aside is not None and len(requests) == last_seat:
            del self.output.left_out[aside.request_id]
            try_admit(aside, rt_budget_s)

    # -- the step's order and limits --------------------------------------------------------------------------

    def begin_step(self) -> None:
        self._adapt_batch_cap()
        self.running.sort(key=by_deadline)  # RT by slack; BE are never due (infinity) and keep their order, at the end
        self._be_order, self._rt_by_rank = self._sorted_be(), None
        self.kv.begin_step(self._be_order)

    def _adapt_batch_cap(self) -> None:
        """TCP slow start (paper): begin at the base, double while no RT deadline binds, and go back to the base at once
        when one does, that is, if a deadline kept any request out of the last batch."""
        base, ceiling = min(self.config.base_batch_cap, self.config.max_num_seqs), self.config.max_num_seqs
        bound = DEADLINE in self.output.left_out.values()
        self._batch_cap = base if bound else max(base, min(2 * self._batch_cap, ceiling))
        self.max_batch_size = self._batch_cap if self.config.batch_slow_start else ceiling

    # -- real-time --------------------------------------------------------------------------------------------

    def _rt_by_slack(self, now_s: float) -> tuple[list[Request], list[Request]]:
        """By ascending slack: RT that can be on time, pending and new, and pending RT that are late already."""
        pending = [request for request in self.running if request.is_rt]
        urgent = [request for request in pending if request.deadline_s - now_s >= self._alone_s(request)]
        late = []
        if len(urgent) < len(pending):
            on_time = set(urgent)
            late = [request for request in pending if request not in on_time]
        if newcomers := self._newcomers_on_time(now_s):
            urgent += newcomers
            urgent.sort(key=by_deadline)  # both parts are sorted already, so this is a merge, in linear time
        if self.config.rt_triage:
            urgent, given_up = self._triage(urgent, now_s)
            late = given_up + late
        self.output.slack_s = {rt.request_id: rt.deadline_s - now_s - self.iteration_s for rt in chain(urgent, late)}
        return urgent, late

    def _triage(self, urgent: list[Request], now_s: float) -> tuple[list[Request], list[Request]]:
        """The RT that can all be on time together, and those given up for now so that the others can.

        Moore and Hodgson's algorithm (1968) maximises the number of jobs on time: take them by ascending deadline, and
        whenever one would be late, give up the prompt with most work left so far. RT with a first token are kept.
        """
        latency, prompts = self.latency, [request for request in urgent if request.first_token_s is None]
        if len(prompts) < 2:
            return urgent, []
        given_up: set[Request] = set()
        longest: list[tuple[float, int, Request]] = []  # a heap of the prompts kept so far
        work_s, num_tokens = 0.0, 0
        for place, request in enumerate(urgent):
            context = request.num_computed_tokens
            left = request.num_tokens - context
            cost_s = latency.cost_s(left, context)
            work_s, num_tokens = work_s + cost_s, num_tokens + left
            if request.first_token_s is None:
                heappush(longest, (-cost_s, place, request))
            needed_s = (self._num_chunks(num_tokens) * latency.c0 + work_s) * latency.safety
            if longest and request.deadline_s - now_s < needed_s:
                cost_s, _, victim = heappop(longest)
                work_s, num_tokens = work_s + cost_s, num_tokens - (victim.num_tokens - victim.num_computed_tokens)
                given_up.add(victim)
        return ([request for request in urgent if request not in given_up],
                [request for request in urgent if request in given_up])

    def _tokens_left_to_be(self, urgent: list[Request], late: list[Request], now_s: float) -> int:
        """One for each BE that decodes, at most half of the step's, if all RT prompts, and that of a typical RT that
        arrives now, are on time in steps without these tokens; else 0."""
        has_prompts = any(request.first_token_s is None for request in urgent)
        if not (self.config.rt_leaves_tokens and has_prompts) or late or self._rt_late.head():
            return 0
        latency, offloaded = self.latency, self.kv.offloaded_tokens
        decoding = [request for request in self._be_order if request.num_tokens - request.num_computed_tokens == 1
                    and request.request_id not in offloaded]
        del decoding[max(0, min(self.max_batch_size - len(urgent), self.max_step_tokens // 2)):]
        tokens_per_step = self.max_step_tokens - len(decoding)
        step_s = latency.c0 + sum(latency.c1 + latency.c3 * request.num_computed_tokens for request in decoding)
        num_tokens = int(self._typical_prompt_tokens)
        work_s = latency.cost_s(num_tokens, 0)
        for request in urgent:
            left = request.num_tokens - request.num_computed_tokens
            num_tokens, work_s = num_tokens + left, work_s + latency.cost_s(left, request.num_computed_tokens)
            needed_s = (cdiv(num_tokens, tokens_per_step) * step_s + work_s) * latency.safety
            if request.first_token_s is None and request.deadline_s - now_s < needed_s:
                return 0
        return len(decoding)

    def _newcomers_on_time(self, now_s: float) -> list[Request]:
        """The first of the RT queue, at most as many as a batch holds. Those that can no longer meet their deadline
        move to `_rt_late`, for good, so that a burst of late ones does not hide those that can be on time."""
        waiting, num_seen = self._rt_waiting, 0
        on_time: list[Request] = []
        for request in waiting:
            if len(on_time) == self.max_batch_size:
                break
            num_seen += 1
            if request.status.is_end:
                continue
            if request.deadline_s - now_s < self._alone_s(request):
                self._rt_late.push(request)
            else:
                on_time.append(request)
        if len(on_time) < num_seen:
            waiting[:num_seen] = on_time
        return on_time

    def _alone_s(self, request: Request) -> float:
        """The least time to this request's next token: the time of all its remaining chunks, run alone."""
        latency, context, offloaded = self.latency, request.num_computed_tokens, self.kv.offloaded_tokens
        left = request.num_tokens - context
        if left == 1:
            executing_s = latency.c0 + latency.c1 + latency.c3 * context
        else:
            executing_s = self._num_chunks(left) * latency.c0 + latency.cost_s(left, context)
        restoring_s = latency.restore_s_per_token * offloaded.get(request.request_id, 0)
        return max(executing_s, restoring_s) * latency.safety

    def _num_chunks(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.config.max_num_batched_tokens) if self.config.chunked_prefill else 1

    # -- best-effort ------------------------------------------------------------------------------------------

    def _sorted_be(self) -> list[Request]:
        """BE that hold KV: first the starving, then by (tokens to restore - aging * steps waited). Finds the starving:
        if no BE holds KV, the head of the queue may be one."""
        order = [request for request in self.running if not request.is_rt]
        order.sort(key=by_last_step)
        latest = self.step - self.config.be_max_wait_steps - 1  # the last step of one that starves
        offloaded, step, aging = self.kv.offloaded_tokens, self.step, self.config.be_aging_tokens_per_step
        num_starving = bisect_right(order, latest, key=by_last_step)
        self._starving_be = order[:num_starving]
        if offloaded:  # else the sort above has said it all
            order[num_starving:] = sorted(order[num_starving:], key=lambda request: (
                offloaded.get(request.request_id, 0) - aging * (step - request.last_step)))
        head = self._be_waiting.head()
        if not order and head is not None and head.last_step <= latest:
            self._starving_be.append(head)
        return order

    def _admit_starving_be(self, step_budget_s: float) -> None:
        """Admits at most one starving BE, the first that fits; called once per step. One that does not fit becomes
        the first victim of preemption, so that it does not hold blocks that the next one needs."""
        for request in self._starving_be:
            if self.try_admit(request, step_budget_s, exempt=True) is ADMITTED:
                break
            if request.status is RUNNING:
                self._be_order.remove(request)
                self._be_order.append(request)
        self._starving_be = []

    def _newcomer_budget_s(self) -> float:
        """The longest iteration after which a typical RT that arrives right now can still meet its TTFT; no bound if
        even the shortest iteration is too long."""
        latency, prompt_tokens = self.latency, int(self._typical_prompt_tokens)
        own_s = (latency.c0 + latency.cost_s(prompt_tokens, 0)) * latency.safety
        left_s = self._typical_ttft_s - own_s
        return left_s if left_s > (latency.c0 + latency.c1) * latency.safety else math.inf

    def _slowed_s(self) -> float:
        """The longest iteration that BE may cause when RT are in it: what the RT admitted so far take alone, plus
        (x - 1) * c0, where x is `rt_slowdown`. No iteration is shorter than c0, so it is at most x times as long.
        A share of the whole iteration would also stretch the prefills of RT, and overshoots."""
        if self.config.rt_slowdown is None or not self.output.requests:
            return math.inf
        stretch_s = (self.config.rt_slowdown - 1) * self.latency.c0
        return (self.latency.predict(self.output.features) + stretch_s) * self.latency.safety

    def _a_decode_fits(self, step_budget_s: float) -> bool:
        return (self.executing_s + self.latency.c1) * self.latency.safety <= step_budget_s

    # -- shortage ---------------------------------------------------------------------------------------------

    def can_admit(self, request: Request) -> bool:
        """True for RT, which may preempt BE, and for starving BE; others need blocks for the whole prompt."""
        return request.is_rt or request in self._starving_be or super().can_admit(request)

    def takes_part_of_a_chunk(self, request: Request) -> bool:
        """True for BE; an RT takes the blocks of others instead."""
        return not request.is_rt

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        """Preempts only if `request` fits once all requests that it may preempt have given up their blocks.

        For BE: swap out blocks of BE ordered after it, or recompute these BE if the host store is full. (A new BE
        preempts nothing: it is tried when its blocks are free, or as the starving head when no BE holds KV.) For RT,
        when slots of BE did not suffice: recompute the BE ordered last if that makes enough room (their slots would
        have been taken before if the host store had room for them); else swap out the RT with the most slack (paper),
        or recompute it if the host store is full.
        """
        if not request.is_rt and self.kv.reclaim(request, num_new_tokens):
            return True
        victims = [*takewhile(lambda other: other is not request, reversed(self._be_order))]
        victims = [other for other in victims if self._can_give(other)]
        if not self.kv.fits_without(request, num_new_tokens, victims):
            rt_victims = self._less_urgent_rt(request) if request.is_rt else []
            if not rt_victims or not self.kv.fits_without(request, num_new_tokens, victims + rt_victims):
                return False
            victims = rt_victims
        for victim in victims:
            if victim.is_rt and self.kv.swap_out(victim.request_id):
                self.output.preempted[victim.request_id] = "swap"
                return True
            if self.kv.frees_blocks_for(victim.request_id, request.request_id):
                self.recompute(victim)
                return True
        return False

    def _less_urgent_rt(self, request: Request) -> list[Request]:
        """The idle RT that may give way to `request`: late ones first, then by the latest deadline. It does not change
        as a prefill advances, so two prompts that do not fit together do not preempt each other again and again."""
        now_s, spared_s = self.output.now_s, -math.inf
        if not self.config.rt_displaces_eagerly:
            if request.request_id in self.kv.offloaded_tokens and self._can_wait(request):
                return []
            if request.status is WAITING and request.slo is not None:
                spared_s = request.slo.ttft_s
        if self._rt_by_rank is None:  # once per step, for in overload every RT that waits asks
            self._rt_by_rank = sorted((rt for rt in self.running if rt.is_rt and self._can_give(rt)), key=self._rank,
                                      reverse=True)
        own_rank = self._rank(request)
        behind = takewhile(lambda other: self._rank(other) > own_rank, self._rt_by_rank)
        return [other for other in behind if other.deadline_s - now_s > spared_s and self._can_give(other)]

    def _rank(self, rt: Request) -> tuple[bool, float, float, str]:
        """The order in which RT give way. It is total: of any two, one must give way to the other."""
        return (rt.deadline_s - self.output.now_s < self._alone_s(rt), rt.deadline_s, rt.arrival_s, rt.request_id)

    def _can_wait(self, request: Request) -> bool:
        """Whether it can still be on time if it sits out two iterations."""
        soonest_s = 2 * self.iteration_s * self.latency.safety + self._alone_s(request)
        return request.deadline_s - self.output.now_s > soonest_s

    def _can_give(self, other: Request) -> bool:
        """Whether it holds blocks and is not in this step's batch."""
        return other.last_step < self.step and self.kv.num_device_blocks(other.request_id) > 0
