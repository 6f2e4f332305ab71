"""BROS for vLLM V1. Read it together with `scheduler/bros.py`, which makes the decisions here too, unchanged.

Each step has three parts:

    1. sync        our scheduler copies the state of vLLM's requests: tokens, preemptions, prefix cache hits
    2. plan        `scheduler/bros.py` packs a batch, using our latency model and vLLM's free blocks (`blocks.py`)
    3. carry out   vLLM's own `schedule` runs on the planned requests only, and gives each at most the tokens that the
                   plan grants; vLLM still manages block tables, prefix cache, sampling and statistics

These parts of BROS carry over: the order by slack, batches bounded by deadlines, chunks that fit the deadlines, RT
preempting BE, and the bound on how long BE wait. A request that the plan leaves out keeps its KV and sits out the step,
as in the paper. These do not: two owners in one block (vLLM's kernels fill blocks from the front), and copying single
slots to host memory. A request that gives up its blocks is recomputed, except for what vLLM's prefix cache still has,
and what the host store has if `connector.py` is used.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from bros_ref import request as ours
from bros_ref.config import SchedulerConfig
from bros_ref.integrations.vllm.blocks import VLLMBlocks
from bros_ref.integrations.vllm.connector import HostKVConnector
from bros_ref.integrations.vllm.parameters import Settings, class_and_slo
from bros_ref.scheduler import PLUS, bros, output
from bros_ref.scheduler.latency_model import UNLIMITED_TOKENS, StepLatencyModel

logger = init_logger(__name__)
LOOKED_UP = 16  # requests of each waiting queue that are looked up in the prefix cache per step
# A new RT waits for the end of a step, then perhaps for a step with another RT's prefill, and then for its own step.
WAIT_SHARE = 1 / 3


class Planner(bros.BROSScheduler):
    """`bros-plus` with three changes (ours): vLLM's limits on which requests may start to hold KV; BE fill a step only
    up to WAIT_SHARE of a TTFT; and BE sit out instead of preempting, since vLLM recomputes preempted requests.

    Attributes:
        max_holders: the maximum number of requests that hold KV; None: limited by the blocks only.
        takes_newcomers: whether requests without KV may be admitted; False while vLLM drains.
        expected_ttft_s: the TTFT target that is assumed until the first RT has arrived.
    """

    max_holders: int | None = None
    takes_newcomers = True
    expected_ttft_s = math.inf

    def can_admit(self, request: ours.Request) -> bool:
        return self.takes_newcomers and super().can_admit(request) and self._finds_a_row(request)

    def _finds_a_row(self, request: ours.Request) -> bool:
        """vLLM's model runner V2 keeps a row for each request that holds KV. If no row is free, an RT takes the row of
        the last BE in the order that can give up its KV."""
        if self.max_holders is None or len(self.running) < self.max_holders:
            return True
        if request.is_rt:
            for victim in reversed(self._be_order):
                if self._can_give(victim):
                    self.recompute(victim)
                    return True
        return False

    def preempt_for(self, request: ours.Request, num_new_tokens: int) -> bool:
        """A BE that needs a block keeps its KV and sits out while others can run, because recomputation costs more. RT,
        a starving BE, and a BE without which the machine would idle preempt as in `bros.py`."""
        waits = not request.is_rt and self.output.requests and request not in self._starving_be
        return not waits and super().preempt_for(request, num_new_tokens)

    def _newcomer_budget_s(self) -> float:
        """At most `WAIT_SHARE` of the TTFT of a typical RT, if the shortest iteration is no longer than that."""
        ttft_s = self._typical_ttft_s if self._typical_ttft_s < math.inf else self.expected_ttft_s
        wait_s = WAIT_SHARE * ttft_s
        if wait_s <= (self.latency.c0 + self.latency.c1) * self.latency.safety:
            wait_s = math.inf
        return min(wait_s, super()._newcomer_budget_s())

    def first_waiting(self, num: int) -> list[ours.Request]:
        """The first `num` requests of each queue, which may be admitted next."""
        urgent = [request for request in self._rt_waiting[:num] if not request.status.is_end]
        return [*urgent, *self._rt_late.first(num), *self._be_waiting.first(num)]


class BROSScheduler(Scheduler):  # type: ignore[misc]  # vLLM has no types where it is not installed
    """The class for `--scheduler-cls`; with asynchronous scheduling its instances are `AsyncBROSScheduler`.

    Raises:
        ValueError: a setting or a feature of vLLM that this scheduler does not support.
    """

    clock = staticmethod(time.time)  # the clock of vLLM's arrival times

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> BROSScheduler:
        """Picks the asynchronous class if needed, as vLLM picks between its own two classes."""
        is_async = vllm_config.scheduler_config.async_scheduling and cls is BROSScheduler
        return super().__new__(AsyncBROSScheduler if is_async else cls)  # type: ignore[no-any-return]

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._refuse_unsupported()
        settings = self.settings = Settings.read(vllm_config.additional_config)
        config = SchedulerConfig(
            max_num_seqs=self.max_num_active_reqs, max_num_batched_tokens=self.max_num_scheduled_tokens,
            max_context_tokens=self.max_model_len, be_max_wait_steps=settings.be_max_wait_steps,
            rt_slowdown=settings.rt_slowdown,
            **{option: value for change in PLUS.values() for option, value in change.items()})
        self.planner = Planner(config, VLLMBlocks(self.kv_cache_manager, self.block_size),
                               StepLatencyModel(settings.latency) if settings.latency else None)
        self.planner.max_holders = self.max_num_running_reqs if self.use_v2_model_runner else None
        self.planner.expected_ttft_s = settings.ttft_slo_s
        self.scheduler_reserve_full_isl = False  # the plan decides whether a whole prompt has to fit
        self.defer_block_free = False  # HostKVConnector copies in the order of the steps: blocks are free at once
        self._grants: dict[str, int] = {}  # request id -> its maximum number of tokens in this step
        self._in_flight: deque[tuple[SchedulerOutput, float]] = deque()  # and when they were scheduled
        self._updated_s = -math.inf
        self._blocked: list[Request] = []  # not ready yet, for example while a grammar is compiled
        self._refused: set[str] = set()  # ids of requests with invalid arguments

    def _refuse_unsupported(self) -> None:
        config = self.vllm_config
        unsupported = {
            "--scheduling-policy other than fcfs": self.policy is not SchedulingPolicy.FCFS,
            "speculative decoding": config.speculative_config is not None,
            "KV connectors other than HostKVConnector": not isinstance(self.connector, HostKVConnector | None),
            "HostKVConnector with context parallelism": self.connector is not None and self.dcp_world_size > 1,
            "encoder-decoder models": self.is_encoder_decoder,
            "pooling models": config.model_config.runner_type == "pooling",
            "pipeline parallelism": self.parallel_config.pipeline_parallel_size > 1,
            "models with several kinds of KV cache": len(self.kv_cache_config.kv_cache_groups) != 1,
            "--no-enable-chunked-prefill": not self.scheduler_config.enable_chunked_prefill,
            "a watermark of free blocks": self.scheduler_config.watermark > 0}
        if found := [name for name, is_used in unsupported.items() if is_used]:
            raise ValueError(f"bros_ref.integrations.vllm.BROSScheduler does not support {' or '.join(found)}; leave "
                             "that out, or use vLLM's own scheduler")

    # -- one step ---------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: sync, plan, carry out."""
        now_s = self.clock()
        self._grants = {}
        if self._pause_state != PauseState.PAUSED_ALL:
            self._sync()
            self.planner.takes_newcomers = self._pause_state == PauseState.UNPAUSED
            plan = self.planner.schedule(now_s)
            for request_id in plan.preempted:
                self._give_up(self.requests[request_id])
            self._grants = self._within_budget(plan)
        scheduled = self._carry_out(throttle_prefills)
        self._in_flight.append((scheduled, now_s))
        return scheduled

    def _sync(self) -> None:
        """Copies from vLLM which requests are ready, which hold KV, and how many of their tokens are computed."""
        planner, requests = self.planner, self.requests
        self._blocked = [request for request in self._blocked if not request.is_finished() and not (
            self._handle_blocked_waiting_request(request) and self._enter(request))]
        for mirror in list(planner.running):
            request = requests[mirror.request_id]
            if request.status != RequestStatus.RUNNING:  # vLLM preempted it, or did not admit it as planned
                planner.forget_kv(mirror.request_id)
            self._copy_progress(request, mirror, request.num_computed_tokens)
        for mirror in planner.first_waiting(LOOKED_UP):
            request = requests[mirror.request_id]
            _, num_hits, *_ = self.kv_cache_manager.get_computed_blocks(request)
            if self.connector is not None:
                num_hits += self.connector.get_num_new_matched_tokens(request, num_hits)[0]
            self._copy_progress(request, mirror, num_hits)

    def _copy_progress(self, request: Request, mirror: ours.Request, num_computed_tokens: int) -> None:
        """With asynchronous scheduling, a token that is still being sampled counts as known: it is the next input."""
        mirror.num_computed_tokens = num_computed_tokens
        mirror.num_tokens = request.num_tokens + request.num_output_placeholders
        has_all = request.num_output_tokens + request.num_output_placeholders >= request.max_tokens
        if has_all or (request.num_stale_output_tokens and not request.drop_stale_output):
            mirror.num_tokens = num_computed_tokens  # vLLM would not schedule it now: nothing left to compute

    def _within_budget(self, plan: output.SchedulerOutput) -> dict[str, int]:
        """Request id -> tokens. Starving requests are exempt from our token budget but not from vLLM's, so the longest
        chunk is shortened to make room for them."""
        grants = {request.request_id: count
                  for request, count in zip(plan.requests, plan.num_scheduled_tokens, strict=True)}
        excess = sum(grants.values()) - self.max_num_scheduled_tokens
        while excess > 0:
            longest = max(grants, key=lambda request_id: grants[request_id])
            cut = min(excess, max(grants[longest] - 1, 1))
            grants[longest] -= cut
            excess -= cut
        return grants

    def _give_up(self, request: Request) -> None:
        """Preempts a request; the KV of a BE goes to the host store if there is one."""
        if self.connector is not None and not self.planner.requests[request.request_id].is_rt:
            self.connector.save(request, self.kv_cache_manager.get_block_ids(request.request_id)[0])
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())

    def _carry_out(self, throttle_prefills: bool) -> SchedulerOutput:
        """Runs vLLM's `schedule` on the planned requests, in the plan's order, and hides all other requests from it."""
        grants = self._grants
        pending: list[Request] = [request for request in self.running if request.request_id not in grants]
        behind: list[Request] = [request for request in self.waiting if request.request_id not in grants]
        planned = [self.requests[request_id] for request_id in grants]
        self.running: list[Request] = [request for request in planned if request.status == RequestStatus.RUNNING]
        self.waiting: Any = create_request_queue(self.policy)
        for request in planned:
            if request.status != RequestStatus.RUNNING:
                self.waiting.add_request(request)
        scheduled = super().schedule(throttle_prefills)
        self.running += pending
        for request in behind:
            self.waiting.add_request(request)
        return scheduled

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM calls this for every request that it is about to schedule; the plan's grant is the limit."""
        granted = min(num_new_tokens, self._grants.get(request.request_id, 0))
        return int(super()._reserve_prefill_lookahead(request, num_computed_tokens, granted))

    # -- the results of a step --------------------------------------------------------------------------------

    def update_from_output(self, scheduler_output: SchedulerOutput,
                           model_runner_output: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        """Updates our latency model and the deadlines, then calls vLLM's own update."""
        now_s, started_s = self.clock(), 0.0
        while self._in_flight:
            step, started_s = self._in_flight.popleft()
            if step is scheduler_output:
                break
        duration_s = now_s - max(started_s, self._updated_s)  # asynchronous steps are scheduled while others run
        self._updated_s = now_s
        if scheduler_output.num_scheduled_tokens:
            self._learn(scheduler_output, model_runner_output, now_s, duration_s)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for request in self.finish_requests(self._refused, RequestStatus.FINISHED_ERROR) if self._refused else ():
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(EngineCoreOutput(
                request_id=request.request_id, new_token_ids=[], finish_reason=request.get_finished_reason()))
        self._refused.clear()
        return outputs

    def _learn(self, scheduled: SchedulerOutput, model_output: ModelRunnerOutput, now_s: float,
               duration_s: float) -> None:
        """Updates our scheduler with the step that vLLM actually ran and the context lengths of its requests."""
        cached = scheduled.scheduled_cached_reqs
        contexts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        contexts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        step = output.SchedulerOutput(self.planner.step, now_s)
        token_ids: list[int | None] = []
        for request_id, count in scheduled.num_scheduled_tokens.items():
            step.features.add(count, contexts[request_id])
            if (mirror := self.planner.requests.get(request_id)) is not None:  # else it was aborted in the meantime
                sampled = model_output.sampled_token_ids
                new_ids = sampled[model_output.req_id_to_index[request_id]] if sampled else []
                step.requests.append(mirror)
                step.num_scheduled_tokens.append(count)
                token_ids.append(int(new_ids[-1]) if len(new_ids) else None)
        self.planner.update_from_output(step, token_ids, now_s, duration_s)

    # -- life of a request ------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Adds it to vLLM, then to our scheduler. Invalid arguments end the request with an error, not the engine."""
        super().add_request(request)
        if self._is_blocked_waiting_status(request.status):
            self._blocked.append(request)
        else:
            self._enter(request)

    def _enter(self, request: Request) -> bool:
        """Adds a request that is ready to our scheduler, or refuses it. Returns True: it is no longer blocked."""
        try:
            if request.resumable:
                raise ValueError("streaming input is not supported by BROSScheduler")
            cls, slo = class_and_slo(request.sampling_params.extra_args, self.settings)
            # vLLM decides when a request ends, so our own token limit must never apply
            self.planner.add(ours.Request(
                request.request_id, cls, range(request.num_prompt_tokens), arrival_s=request.arrival_time, slo=slo,
                sampling=ours.SamplingParams(max_tokens=UNLIMITED_TOKENS)))
        except ValueError as error:
            logger.error("Request %s is refused: %s", request.request_id, error)
            self._refused.add(request.request_id)
        return True

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        """vLLM calls this for every request that ends, whatever the reason."""
        if (mirror := self.planner.requests.get(request.request_id)) is not None:
            self.planner.finish(mirror, ours.RequestStatus.ABORTED)
        return super()._free_request(request, delay_free_blocks)


class AsyncBROSScheduler(BROSScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same on top of vLLM's asynchronous scheduler. Deadlines then lag by one step."""
