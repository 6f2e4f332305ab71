"""What all policies share: the admission check, the request life cycle, and the accounting of a step.

    schedule(now_s):      starts a step, lets the policy `pack` its batch, and completes the output
    policy.pack(now_s):   calls `try_admit` for each candidate, in the policy's order
    try_admit(request):   a seat?  tokens left?  does the deadline hold?  blocks?  -> ADMITTED, or why not

It imports no torch and never reads a clock, so every decision can be stepped through in a debugger, live or
simulated. Invariant: between steps each RUNNING request's KV holds exactly `num_computed_tokens` tokens (on the
device or in the host store) and each WAITING one's holds none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bros_ref.config import SchedulerConfig
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.latency_model import StepFeatures, StepLatencyModel
from bros_ref.scheduler.output import (
    ADMITTED,
    BATCH_CAP,
    DEADLINE,
    NO_BLOCKS,
    TOKEN_BUDGET,
    Admission,
    SchedulerOutput,
)

ITERATION_EMA = 0.1  # weight of the newest step in the moving average of iteration time
WAITING, RUNNING = RequestStatus.WAITING, RequestStatus.RUNNING
BANKED_SHARE = 0.9  # of TPOT, that time is banked against; the rest is for iterations longer than predicted


class Scheduler:
    """What all policies share. A policy overrides `setup`, `enqueue`, `dequeue`, `pack`, and `preempt_for` if it
    preempts.

    Attributes:
        reserves_whole_requests: whether admission reserves blocks for all tokens that a request may still generate.
        requests: all live requests, by id.
        running: requests that hold KV, in admission order.
        max_batch_size: the most requests in the batch of this step.
        max_step_tokens: the most tokens of this step; a policy may lower it while it packs.
        executing_s: predicted seconds to compute the batch admitted so far, without the safety factor.
        output: the step that is being packed, or else the last one.
    """

    reserves_whole_requests = False

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, latency: StepLatencyModel | None = None,
                 eos_token_ids: Sequence[int] = ()) -> None:
        self.config = config
        self.kv = kv
        self.latency = latency or StepLatencyModel()
        self.eos_token_ids = frozenset(eos_token_ids)
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.step = 0
        self.iteration_s = 0.0  # moving average
        self.max_batch_size = config.max_num_seqs
        self.max_step_tokens = config.max_num_batched_tokens
        self.executing_s = 0.0
        self.output = SchedulerOutput(0, 0.0)
        self.setup()

    # -- what a policy provides -------------------------------------------------------------------------------

    def setup(self) -> None:
        """Makes the policy's own state."""

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        """Puts a WAITING request into the policy's queue; `front` if it was preempted and comes back."""
        raise NotImplementedError

    def dequeue(self, request: Request) -> None:
        """Takes a WAITING request out of the policy's queue: it has just been admitted."""
        raise NotImplementedError

    def pack(self, now_s: float) -> None:
        """Fills the batch: calls `try_admit` for one candidate after another, in the policy's order, and returns at
        the latest when the answer is BATCH_CAP."""
        raise NotImplementedError

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        """Called when the pool has no blocks for `request`. Returns True if it freed some and a retry makes sense."""
        return False

    def can_admit(self, request: Request) -> bool:
        """Whether the pool has room for all known tokens of a WAITING request. Its first chunk may need less, but
        admitting on the first chunk alone causes requests to preempt each other (vLLM: `scheduler_reserve_full_isl`).
        """
        return self.kv.blocks_for(request.num_tokens) <= self.kv.num_free_blocks

    def takes_part_of_a_chunk(self, request: Request) -> bool:
        """Whether a chunk is halved until its blocks fit, when there are too few for the whole chunk."""
        return False

    def begin_step(self) -> None:
        """Called at the start of each step, while `output` is still the last step's."""
        self.kv.begin_step()

    # -- one iteration ----------------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> SchedulerOutput:
        """Decides one iteration. Expected scarcity is recorded in the output, never raised."""
        self.step += 1
        self.max_step_tokens = self.config.max_num_batched_tokens
        self.begin_step()
        self.output = SchedulerOutput(self.step, now_s)
        self.executing_s = self.latency.c0
        self.pack(now_s)
        return self._complete(self.output)

    def try_admit(self, request: Request, step_budget_s: float = math.inf, exempt: bool = False) -> Admission:
        """Adds a live request to the batch, or records in `output.left_out` why it does not fit.

        Args:
            request: not in the batch yet. A WAITING one that is admitted leaves its queue and is RUNNING.
            step_budget_s: the longest iteration that the deadlines allow; limits prediction * safety factor.
            exempt: whether neither this budget nor the one in tokens applies to this request.
        """
        output, latency, kv = self.output, self.latency, self.kv
        requests, features, output.step_budget_s = output.requests, output.features, step_budget_s
        if output.preempted and request.request_id in output.preempted:  # it gave way in this very step
            return self.refuse(request, NO_BLOCKS)

        # 1. A seat, and tokens: a decode takes one, a prefill is cut to what fits if it may be.
        if len(requests) >= self.max_batch_size:
            return self.refuse(request, BATCH_CAP)
        context, spare_s = request.num_computed_tokens, step_budget_s / latency.safety - self.executing_s
        count = request.num_tokens - context
        if count == 1:
            if features.new_tokens >= self.max_step_tokens and not exempt:
                return self.refuse(request, TOKEN_BUDGET)
            cost_s = latency.c1 + latency.c3 * context
        else:
            count, reason = self._fit_prefill(request, count, spare_s, exempt)
            if reason is not ADMITTED:
                return self.refuse(request, reason)
            cost_s = latency.cost_s(count, context)

        # 2. The most urgent deadline still holds with it in the batch; so do its copies from the host.
        if cost_s > spare_s and requests and not exempt:
            return self.refuse(request, DEADLINE)
        restored = kv.offloaded_tokens.get(request.request_id, 0) if kv.offloaded_tokens else 0
        if restored and requests and not exempt and not self._restore_fits(restored, step_budget_s):
            return self.refuse(request, DEADLINE)

        # 3. Blocks, if need be after the policy has made room. A newcomer's whole prompt must fit.
        is_newcomer = request.status is WAITING
        if is_newcomer and not self.can_admit(request):
            return self.refuse(request, NO_BLOCKS)
        lookahead = request.max_total_tokens - count if is_newcomer and self.reserves_whole_requests else 0
        table = kv.allocate_slots(request, count, lookahead)
        if table is None:
            table, count = self._make_room(request, count)
            if table is None:
                return self.refuse(request, NO_BLOCKS)
            cost_s, features = latency.cost_s(count, context), output.features  # a victim may have left the batch

        # 4. It is in.
        self.executing_s += cost_s
        features.new_tokens += count
        if count == 1:
            features.decode_contexts += context
        else:
            features.prefill_products += count * (context + count / 2)
        if restored:
            features.restored_tokens += restored
        requests.append(request)
        output.num_scheduled_tokens.append(count)
        output.block_tables.append(table)
        request.last_step = self.step
        if is_newcomer:
            self.dequeue(request)
            request.status = RUNNING
            self.running.append(request)
        return ADMITTED

    def admit_newcomer(self, request: Request) -> Admission:
        """`try_admit` for policies in which each running request holds a seat, even in steps that it sits out."""
        if len(self.running) >= self.max_batch_size:
            return self.refuse(request, BATCH_CAP)
        return self.try_admit(request)

    def refuse(self, request: Request, reason: Admission) -> Admission:
        """Records why `request` sits out this step, if it is the first reason, and returns the reason."""
        self.output.left_out.setdefault(request.request_id, reason)
        return reason

    def _fit_prefill(self, request: Request, wanted: int, spare_s: float, exempt: bool) -> tuple[int, Admission]:
        """Tokens of a prefill to compute now, at most `wanted`, and ADMITTED; or 0 and why not."""
        features, config = self.output.features, self.config
        tokens_left = self.max_step_tokens - features.new_tokens
        if not config.chunked_prefill:
            # one longer than the budget is the only prefill of its step; decodes would otherwise keep it out for good
            if wanted <= tokens_left or not features.prefill_products or exempt:
                return wanted, ADMITTED
            return 0, TOKEN_BUDGET
        if exempt:
            tokens_left = max(tokens_left, config.min_chunk_tokens)
        count = min(wanted, tokens_left)
        if count <= 0:
            return 0, TOKEN_BUDGET
        if spare_s < math.inf:
            fitting = self.latency.max_new_tokens(spare_s, request.num_computed_tokens)
            if fitting < count:
                smallest = min(count, config.min_chunk_tokens)
                count = max(fitting, smallest) if exempt or not self.output.requests else fitting
                if count < smallest:
                    return 0, DEADLINE
        return count, ADMITTED

    def _restore_fits(self, restored_tokens: int, step_budget_s: float) -> bool:
        copying_s = self.latency.restore_s_per_token * (self.output.features.restored_tokens + restored_tokens)
        return copying_s * self.latency.safety <= step_budget_s

    def _make_room(self, request: Request, count: int) -> tuple[list[int] | None, int]:
        """Allocates blocks for `count` tokens, preempting others if needed, or for fewer tokens if the policy allows
        it. Returns (table, tokens); the table is None if there is no room for even one token."""
        may_shrink, table = self.config.chunked_prefill and self.takes_part_of_a_chunk(request), None
        while table is None:
            if not self.preempt_for(request, count):
                if count == 1 or not may_shrink:
                    break
                count //= 2
            table = self.kv.allocate_slots(request, count)
        return table, count

    def _complete(self, output: SchedulerOutput) -> SchedulerOutput:
        if output.requests:  # else nobody would run the copies: they wait for the next step that runs
            output.kv_changes = self.kv.take_changes()
        output.predicted_s = self.latency.predict(output.features)
        if output.step_budget_s == math.inf:
            output.step_budget_s = None
        output.binding = next(reversed(output.left_out.values()), None)
        output.num_behind = len(self.requests) - len(output.requests) - len(output.left_out)
        output.num_used_blocks = self.kv.num_used_blocks
        output.num_running = len(self.running)
        output.num_waiting = len(self.requests) - len(self.running)
        return output

    # -- preemption -------------------------------------------------------------------------------------------

    def recompute(self, victim: Request) -> None:
        """Preempts by recomputation: the victim's KV is dropped and it goes back to the front of its queue. If it is
        in this step's batch already, it leaves it."""
        output = self.output
        if victim.last_step == self.step:
            index = output.requests.index(victim)
            del output.requests[index], output.num_scheduled_tokens[index], output.block_tables[index]
            output.features = StepFeatures(restored_tokens=output.features.restored_tokens)  # ordered already
            for request, count in zip(output.requests, output.num_scheduled_tokens, strict=True):
                output.features.add(count, request.num_computed_tokens)
            self.executing_s = self.latency.executing_s(output.features)
        self.kv.free(victim.request_id)
        output.preempted[victim.request_id] = "recompute"
        output.recomputed_tokens += victim.num_computed_tokens
        self.running.remove(victim)
        self._send_back(victim)

    def _send_back(self, victim: Request) -> None:
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        victim.status = RequestStatus.WAITING
        self.enqueue(victim, front=True)

    # -- life of a request ------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running)

    def add(self, request: Request) -> None:
        """Accepts a new request; whether it can ever fit is the engine's check."""
        self.requests[request.request_id] = request
        request.last_step = self.step
        self.enqueue(request)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """Ends a request in whatever state it is: all its blocks and host copies are free. Its entry in a waiting
        queue is skipped when it comes up."""
        was_running = request.status is RequestStatus.RUNNING
        request.status = status
        del self.requests[request.request_id]
        self.kv.free(request.request_id)
        if was_running:
            self.running.remove(request)

    def forget_kv(self, request_id: str) -> None:
        """A request's stored KV can no longer be trusted (copies of a failed step): it will be recomputed."""
        request = self.requests.get(request_id)
        if request is not None and request.status is RequestStatus.RUNNING:
            self.kv.free(request_id)
            self.running.remove(request)
            self._send_back(request)

    def restart(self) -> None:
        """Recovers from an exception or an interrupt in the middle of `schedule`: every live request goes back to
        waiting, in the order of arrival at the engine, and recomputes its KV."""
        self.kv.reset()
        self.running.clear()
        self.setup()
        for request in self.requests.values():
            if request.status is RequestStatus.RUNNING:
                request.num_computed_tokens = 0
                request.num_preemptions += 1
                request.status = RequestStatus.WAITING
            self.enqueue(request)

    def update_from_output(self, output: SchedulerOutput, token_ids: Sequence[int | None], now_s: float,
                           duration_s: float) -> list[Request]:
        """Records a computed step: `token_ids` is parallel to `output.requests`, None where nothing was sampled.

        Returns:
            The requests that ended with this step.
        """
        ended: list[Request] = []
        eos, banks_time = self.eos_token_ids, self.config.rt_banks_time
        for request, count, token_id in zip(output.requests, output.num_scheduled_tokens, token_ids, strict=True):
            request.num_computed_tokens += count
            if token_id is None:  # a chunk that did not complete the prompt
                continue
            request.output_token_ids.append(token_id)
            request.num_tokens = num_tokens = request.num_tokens + 1
            request.last_token_s = now_s
            if request.first_token_s is None:
                request.first_token_s = now_s
            if (slo := request.slo) is not None:
                deadline_s = now_s + slo.tpot_s
                if banks_time:
                    banked_s = BANKED_SHARE * slo.tpot_s * len(request.output_token_ids)
                    deadline_s = max(deadline_s, request.first_token_s + banked_s)
                request.deadline_s = deadline_s
            if token_id in eos and not request.sampling.ignore_eos:
                request.status = RequestStatus.FINISHED_STOP
                ended.append(request)
            elif num_tokens >= request.max_total_tokens:
                request.status = RequestStatus.FINISHED_LENGTH
                ended.append(request)
        for request in ended:
            del self.requests[request.request_id]
            self.kv.free(request.request_id)
        if ended:
            self.running = [request for request in self.running if not request.status.is_end]
        self.latency.observe(output.features, duration_s)
        weight = ITERATION_EMA if self.iteration_s else 1.0
        self.iteration_s += weight * (duration_s - self.iteration_s)
        return ended
