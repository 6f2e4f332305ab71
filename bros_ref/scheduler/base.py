"""The one admission loop. A policy is an order of candidates, plus what it does when blocks run out.

    schedule(now_s):  for each candidate, in the policy's order:
                          a seat?  tokens left?  does the deadline hold?  blocks?   -> into the batch
                          otherwise the reason is recorded, and the policy decides whether to go on

It imports no torch and never reads a clock, so every decision can be stepped through in a debugger, live or
simulated. Invariant: between steps each RUNNING request's KV holds exactly `num_computed_tokens` tokens (on the
device or in the host store) and each WAITING one's holds none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bros_ref.config import SchedulerConfig
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.latency_model import StepFeatures, StepLatencyModel
from bros_ref.scheduler.output import BATCH_CAP, DEADLINE, NO_BLOCKS, TOKEN_BUDGET, SchedulerOutput

ITERATION_EMA = 0.1  # weight of the newest step in the moving average of iteration time
BANKED_SHARE = 0.9  # of TPOT, that time is banked against; the rest is for iterations longer than predicted


class Scheduler:
    """What all policies share. A policy overrides `setup`, `enqueue`, `candidates`, and `preempt_for` if it preempts.

    Attributes:
        reserves_whole_requests: whether admission reserves blocks for all that a request may still generate.
        requests: all live requests, by id.
        running: requests that hold KV, in admission order.
        max_batch_size, step_budget_s, exempt: limits of the step, which the policy sets; `step_budget_s` (with the
            model's safety factor applied to predictions) is the longest iteration the deadlines allow,
            and `exempt` lifts it for one candidate.
        refusal: why the last candidate was not taken; None if it was.
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
        self.step_budget_s = math.inf
        self.exempt = False
        self.refusal: str | None = None
        self.output = SchedulerOutput(0, 0.0)
        self.setup()

    # -- what a policy provides -------------------------------------------------------------------------------

    def setup(self) -> None:
        """Makes the policy's own state."""

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        """Puts a WAITING request into the policy's queue; `front` if it was preempted and comes back."""
        raise NotImplementedError

    def candidates(self, now_s: float) -> Iterator[Request]:
        """Yields requests in the order in which they may take a place in the batch. After each yield,
        `self.refusal` says whether it was taken; a WAITING request that was taken is RUNNING by then. One that was
        preempted in this step is refused by the loop."""
        raise NotImplementedError

    def preempt_for(self, request: Request, num_new_tokens: int) -> bool:
        """Called when the pool has no blocks for `request`. Returns True if it freed some and a retry makes sense."""
        return False

    def can_admit(self, request: Request) -> bool:
        """Whether the pool has room for all known tokens of a WAITING request, though its first chunk may need less:
        entering on the strength of a chunk ends in preempting one another (vLLM: `scheduler_reserve_full_isl`)."""
        return self.kv.blocks_for(request.num_tokens) <= self.kv.num_free_blocks

    def prefill_advanced(self, request: Request) -> None:
        """Called when a chunk was computed that did not complete the prompt."""

    def begin_step(self, now_s: float) -> None:
        """Sets the limits of the step, before any candidate is drawn."""
        self.kv.begin_step()

    # -- the admission loop -----------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> SchedulerOutput:
        """Decides one iteration. Expected scarcity is recorded in the output, never raised."""
        self.step += 1
        self.output = output = SchedulerOutput(self.step, now_s)
        self.step_budget_s, self.exempt = math.inf, False
        self.begin_step(now_s)
        requests, counts, tables = output.requests, output.num_scheduled_tokens, output.block_tables
        features, preempted, offloaded_tokens = output.features, output.preempted, self.kv.offloaded_tokens
        allocate_slots, reserves, waiting = self.kv.allocate_slots, self.reserves_whole_requests, RequestStatus.WAITING
        safety, per_token_s, per_context_s = self.latency.safety, self.latency.c1, self.latency.c3
        predicted_s, max_tokens, step = self.latency.c0, self.config.max_num_batched_tokens, self.step
        for request in self.candidates(now_s):
            if preempted and request.request_id in preempted:  # it gave way in this very step
                self._refuse(request, NO_BLOCKS)
                continue

            # 1. A seat, and tokens: a decode takes one, a prefill is cut to what fits if it may be.
            if len(requests) >= self.max_batch_size:
                self._refuse(request, BATCH_CAP)
                break
            context = request.num_computed_tokens
            count = request.num_tokens - context
            if count == 1:
                if features.new_tokens >= max_tokens and not self.exempt:
                    self._refuse(request, TOKEN_BUDGET)
                    continue
                cost_s = per_token_s + per_context_s * context
            else:
                count = self._fit_prefill(request, count, predicted_s)
                if count == 0:
                    continue
                cost_s = self.latency.cost_s(count, context)

            # 2. The most urgent deadline still holds with it in the batch; so do its copies from the host. An empty
            #    batch takes its first whatever the bound: an idle machine helps nobody.
            if (predicted_s + cost_s) * safety > self.step_budget_s and not self.exempt and requests:
                self._refuse(request, DEADLINE)
                continue
            restored = offloaded_tokens.get(request.request_id, 0) if offloaded_tokens else 0
            if restored and not self._restore_fits(restored):
                self._refuse(request, DEADLINE)
                continue

            # 3. Blocks, if need be after the policy has made room. A newcomer's whole prompt must fit.
            if request.status is waiting and not self.can_admit(request):
                self._refuse(request, NO_BLOCKS)
                continue
            lookahead = request.max_total_tokens - count if reserves and request.status is waiting else 0
            table = allocate_slots(request, count, lookahead)
            if table is None:
                table = self._preempt_and_allocate(request, count)
                features = output.features  # a victim may have left the batch
                predicted_s = self.latency.predict(features)
                if table is None:
                    self._refuse(request, NO_BLOCKS)
                    continue

            # 4. It is in.
            predicted_s += cost_s
            features.new_tokens += count
            if count == 1:
                features.decode_contexts += context
            else:
                features.prefill_products += count * (context + count / 2)
            if restored:
                features.restored_tokens += restored
            requests.append(request)
            counts.append(count)
            tables.append(table)
            if request.status is waiting:
                request.status = RequestStatus.RUNNING
                self.running.append(request)
            request.last_step = step
            self.refusal = None
        return self._complete(output)

    def _fit_prefill(self, request: Request, wanted: int, predicted_s: float) -> int:
        """Tokens of a prefill to take now, at most `wanted`; 0 if it was refused."""
        output, config = self.output, self.config
        tokens_left = config.max_num_batched_tokens - output.features.new_tokens
        if not config.chunked_prefill:
            # one longer than the budget is the only prefill of its step; decodes would otherwise keep it out for good
            if wanted <= tokens_left or not output.features.prefill_products or self.exempt:
                return wanted
            self._refuse(request, TOKEN_BUDGET)
            return 0
        if self.exempt:
            tokens_left = max(tokens_left, config.min_chunk_tokens)
        count = min(wanted, tokens_left)
        if count <= 0:
            self._refuse(request, TOKEN_BUDGET)
            return 0
        if self.step_budget_s < math.inf:
            spare_s = self.step_budget_s / self.latency.safety - predicted_s
            fitting = self.latency.max_new_tokens(spare_s, request.num_computed_tokens)
            if fitting < count:
                smallest = min(count, config.min_chunk_tokens)
                count = max(fitting, smallest) if self.exempt else fitting
                if count < smallest:
                    self._refuse(request, DEADLINE)
                    return 0
        return count

    def _restore_fits(self, restored_tokens: int) -> bool:
        copying_s = self.latency.restore_s_per_token * (self.output.features.restored_tokens + restored_tokens)
        return self.exempt or not self.output.requests or copying_s * self.latency.safety <= self.step_budget_s

    def _preempt_and_allocate(self, request: Request, count: int) -> list[int] | None:
        table = None
        while table is None and self.preempt_for(request, count):
            table = self.kv.allocate_slots(request, count)
        return table

    def _refuse(self, request: Request, reason: str) -> None:
        self.refusal = self.output.left_out[request.request_id] = reason

    def _complete(self, output: SchedulerOutput) -> SchedulerOutput:
        if output.requests:  # else nobody would run the copies: they wait for the next step that runs
            output.kv_changes = self.kv.take_changes()
        output.predicted_s = self.latency.predict(output.features)
        output.step_budget_s = None if self.step_budget_s == math.inf else self.step_budget_s
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
            output.features = StepFeatures()
            for request, count in zip(output.requests, output.num_scheduled_tokens, strict=True):
                output.features.add(count, request.num_computed_tokens)
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
        """Recovers from an exception or an interrupt in the middle of `schedule`, whatever it left half done: every
        live request waits, in the order of arrival at the engine, and recomputes its KV."""
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
        """Books a computed step: `token_ids` is parallel to `output.requests`, None where nothing was sampled.

        Returns:
            The requests that ended with this step.
        """
        ended: list[Request] = []
        eos, banks_time = self.eos_token_ids, self.config.rt_banks_time
        for request, count, token_id in zip(output.requests, output.num_scheduled_tokens, token_ids, strict=True):
            request.num_computed_tokens += count
            if token_id is None:
                self.prefill_advanced(request)
                continue
            request.output_token_ids.append(token_id)
            request.num_tokens += 1
            request.last_token_s = now_s
            if request.first_token_s is None:
                request.first_token_s = now_s
            if request.is_rt:
                assert request.slo is not None
                deadline_s = now_s + request.slo.tpot_s
                if banks_time:
                    banked_s = BANKED_SHARE * request.slo.tpot_s * len(request.output_token_ids)
                    deadline_s = max(deadline_s, request.first_token_s + banked_s)
                request.deadline_s = request.due_s = deadline_s
            if token_id in eos and not request.sampling.ignore_eos:
                request.status = RequestStatus.FINISHED_STOP
                ended.append(request)
            elif request.num_tokens >= request.max_total_tokens:
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
