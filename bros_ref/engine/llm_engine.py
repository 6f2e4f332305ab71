"""The engine: add requests, call `step()`, read tokens. `step` shows all that an iteration does.

It owns the order of events and the trace; the decisions are the scheduler's and the arithmetic is the runner's.
Invariant: whatever happens inside a step (a runner that raises or is interrupted, a callback that aborts), afterwards
the accounting is consistent, the blocks of ended requests are free, every request that has not ended can go on, and
every end is in the trace. Memory does not grow with the number of requests served, except for what the trace keeps.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from bros_ref.clock import Clock, WallClock
from bros_ref.engine.detokenizer import TextStream
from bros_ref.engine.interrupts import interrupts_held_back
from bros_ref.request import Request, RequestStatus
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.output import SchedulerOutput
from bros_ref.trace.records import RequestRecord, StepRecord
from bros_ref.trace.trace import Trace

if TYPE_CHECKING:  # a simulated run has no tokenizer, and needs no torch
    from bros_ref.model.tokenizer import Tokenizer

OnText = Callable[[Request, str], None]
KEEP_ENDED = 1024  # ended requests whose text and callback error can still be looked up


class Runner(Protocol):
    """What computes a step: `ModelRunner`, or a simulated one that only lets time pass."""

    def execute(self, output: SchedulerOutput) -> Sequence[int | None]: ...


class RequestRefused(ValueError):
    """`add_request` did not accept the request; the message says why. Nothing else is affected."""


class StepFailed(RuntimeError):
    """The runner raised. The requests of that batch have failed; the others go on."""

    def __init__(self, failed: list[str], cause: BaseException) -> None:
        super().__init__(f"the step failed with {type(cause).__name__}: {cause}; failed requests: {', '.join(failed)}")
        self.failed = failed


class RequestsFailed(RuntimeError):
    """A runner raises this when some requests of the batch failed on their own and the others have their tokens.

    Attributes:
        token_ids: as `Runner.execute` returns them; None for those that failed.
        errors: index in the batch -> why that request failed.
    """

    def __init__(self, token_ids: Sequence[int | None], errors: Mapping[int, Exception]) -> None:
        super().__init__(f"{len(errors)} of {len(token_ids)} requests of the batch failed")
        self.token_ids, self.errors = token_ids, errors


class EngineStalled(RuntimeError):
    """No request can run although some wait: a bug in a policy, reported with its reasons instead of spinning."""


class LLMEngine:
    """Continuous batching under any policy.

    Attributes:
        trace: every step's decision with its reason; None if not wanted.
        vocab_size: prompts with other token ids are refused, for one of them would fail its whole batch; None if the
            runner takes any.
        streams: request id -> text so far, of the live requests and the last KEEP_ENDED ended ones, if they were added
            with a tokenizer.
        aborted: ids of the requests that `abort` ended since the last step began.
        callback_errors: request id -> what its `on_text` raised, kept as long as `streams`; such a request has failed
            (its `error` says the same), the others go on.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, clock: Clock | None = None,
                 tokenizer: Tokenizer | None = None, trace: Trace | None = None,
                 vocab_size: int | None = None, seed: int | None = None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock or WallClock()
        self.tokenizer = tokenizer
        self.trace = trace
        self.vocab_size = vocab_size
        self.streams: dict[str, TextStream] = {}
        self.callback_errors: dict[str, Exception] = {}
        self.aborted: set[str] = set()
        self._on_text: dict[str, OnText] = {}
        self._pieces: deque[tuple[Request, OnText, str]] = deque()  # text that is to be handed out
        self._ended_ids: dict[str, None] = {}  # the last KEEP_ENDED, oldest first
        self._seeds = random.Random(seed)  # of requests that sample and bring no seed
        self._idle_steps = 0

    def add_request(self, request: Request, on_text: OnText | None = None) -> None:
        """Accepts a request; it competes from the next step on. `on_text(request, piece)` receives text as it comes.

        A request without an arrival time arrives now; one that samples without a seed is given one.

        Raises:
            RequestRefused: the id of a request that is alive or still in the trace, tokens outside the vocabulary, a
                request that has run before, or one that could never finish in this pool or context.
        """
        arrival_s = self.clock.now_s() if request.arrival_s is None else request.arrival_s
        record = RequestRecord(request.request_id, request.request_class.value, arrival_s,
                               request.num_prompt_tokens, request.sampling.max_tokens)
        if request.slo is not None:
            record.ttft_slo_s, record.tpot_slo_s = request.slo.ttft_s, request.slo.tpot_s
        reason = self._why_not(request, on_text)
        if reason is not None:
            if self.trace is not None and not self._is_known(request.request_id):
                self.trace.requests[request.request_id] = record
                self.trace.rejected[request.request_id] = reason
            raise RequestRefused(f"request {request.request_id!r} refused: {reason}")
        request.arrive(arrival_s)
        if request.sampling.temperature > 0:
            record.seed = request.seed = self._seeds.getrandbits(63) if request.seed is None else request.seed
        self._ended_ids.pop(request.request_id, None)
        if self.tokenizer is not None:
            self.streams[request.request_id] = TextStream(self.tokenizer, request.sampling.stop)
        if on_text is not None:
            self._on_text[request.request_id] = on_text
        if self.trace is not None:
            self.trace.requests[request.request_id] = record
            self.trace.rejected.pop(request.request_id, None)  # it was refused before, and has been shortened since
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """Ends a request, whatever its state; its blocks and host copies are free at once.

        Returns:
            False if no such request is alive (it may just have finished: that is no error).
        """
        request = self.scheduler.requests.get(request_id)
        if request is None:
            return False
        self.scheduler.finish(request, RequestStatus.ABORTED)
        self.aborted.add(request_id)
        self._retire(request_id)
        if self.trace is not None:
            self.trace.ended_outside[request_id] = [self.clock.now_s(), RequestStatus.ABORTED.value]
        return True

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do: live requests, or text that an interrupt kept from being handed out."""
        return bool(self.scheduler.requests or self._pieces)

    def step(self) -> list[Request]:
        """One iteration: schedule, execute, update, hand out text, record. Returns the requests that ended.

        An interrupt (Ctrl-C) is raised again after the step has been put in order: undone while deciding, failed while
        computing, complete once the tokens are there.

        Raises:
            StepFailed: the runner raised; see there.
            EngineStalled: see there.
        """
        self.aborted.clear()
        start_s, cpu_s = self.clock.now_s(), time.thread_time()
        output = self._schedule(start_s)
        schedule_s = time.thread_time() - cpu_s
        for request_id in output.rejected:
            self.abort(request_id)
        if not output.requests:
            return self._idle(output)
        execute_s = self.clock.now_s()
        token_ids, errors = self._execute(output)
        end_s, cpu_s = self.clock.now_s(), time.thread_time()
        ended: list[Request] = []
        try:
            with interrupts_held_back():
                ended += self.scheduler.update_from_output(output, token_ids, end_s, end_s - execute_s)
                schedule_s += time.thread_time() - cpu_s
                ended += [self._end(output.requests[index], error) for index, error in errors.items()]
                if self.tokenizer is not None:
                    ended += self._read_text(output, token_ids)
            self._hand_out(ended)
        finally:
            with interrupts_held_back():
                self._record(output, token_ids, ended, execute_s, end_s, schedule_s)
        return ended

    # -- what a step consists of ------------------------------------------------------------------------------

    def _schedule(self, now_s: float) -> SchedulerOutput:
        try:
            return self.scheduler.schedule(now_s)
        except BaseException:  # half a decision is booked, and nobody knows which half
            with interrupts_held_back():
                self.scheduler.restart()
            raise

    def _execute(self, output: SchedulerOutput) -> tuple[Sequence[int | None], Mapping[int, Exception]]:
        """The sampled tokens, and the requests that failed on their own by index."""
        try:
            token_ids = self.runner.execute(output)
            if len(token_ids) != len(output.requests):
                raise RuntimeError(f"the runner returned {len(token_ids)} tokens for {len(output.requests)} requests")
        except RequestsFailed as partly:
            return partly.token_ids, partly.errors
        except Exception as error:
            raise self._fail(output, error) from error
        except BaseException as interrupt:  # Ctrl-C in the middle of a forward pass: as a failure, but passed on
            self._fail(output, interrupt)
            raise
        return token_ids, {}

    def _end(self, request: Request, error: BaseException) -> Request:
        """Fails one live request."""
        request.error = error
        self.scheduler.finish(request, RequestStatus.FAILED)
        return request

    def _read_text(self, output: SchedulerOutput, token_ids: Sequence[int | None]) -> list[Request]:
        """Turns new tokens into text, to be handed out. Returns the requests that met a stop string."""
        stopped: list[Request] = []
        for request, token_id in zip(output.requests, token_ids, strict=True):
            if token_id is None:
                continue  # the prompt is not done yet, or it failed
            stream, was_ended = self.streams[request.request_id], request.status.is_end  # by length or EOS
            text = "" if request.status is RequestStatus.FINISHED_STOP else stream.push(token_id)  # EOS has no text
            if was_ended:
                text += stream.close()
            if stream.stopped and was_ended:
                request.status = RequestStatus.FINISHED_STOP  # a stop string that ends on the last allowed token
            elif stream.stopped:
                self.scheduler.finish(request, RequestStatus.FINISHED_STOP)
                stopped.append(request)
            if text and (on_text := self._on_text.get(request.request_id)) is not None:
                self._pieces.append((request, on_text, text))
        return stopped

    def _hand_out(self, ended: list[Request]) -> None:
        """Calls the callbacks. One that raises fails its own request, which joins `ended`. An interrupt is raised again
        when all have been called, so that no text is lost."""
        interrupt: BaseException | None = None
        while self._pieces:
            request, on_text, text = self._pieces.popleft()
            if request.status in (RequestStatus.ABORTED, RequestStatus.FAILED):
                continue  # another request's callback ended it
            try:
                on_text(request, text)
            except Exception as error:  # a user's code: it must not take the other requests down
                self.callback_errors[request.request_id] = error
                if not request.status.is_end:
                    ended.append(self._end(request, error))
            except BaseException as error:
                interrupt = interrupt or error
        if interrupt is not None:
            raise interrupt

    def _idle(self, output: SchedulerOutput) -> list[Request]:
        """Handles a step that could run nothing: normal between arrivals, but with live requests it must not last."""
        ended: list[Request] = []
        self._hand_out(ended)
        for request in ended:
            self._retire(request.request_id)
        self._idle_steps = self._idle_steps + 1 if self.scheduler.requests else 0
        if self._idle_steps > 2 * self.scheduler.config.be_max_wait_steps + 2:
            raise EngineStalled(f"{self._idle_steps} steps scheduled nothing; left out: {output.left_out}, "
                                f"behind them: {output.num_behind}, free blocks: {self.scheduler.kv.num_free_blocks}")
        return ended

    def _fail(self, output: SchedulerOutput, error: BaseException) -> StepFailed:
        """Ends the batch's requests; those whose checkpoints may not have been written will be recomputed."""
        for request in output.requests:
            self._end(request, error)
        for request_id in output.kv_changes.copies.checkpointed_requests:
            self.scheduler.forget_kv(request_id)
        now_s = self.clock.now_s()
        self._record(output, [None] * len(output.requests), output.requests, now_s, now_s, 0.0)
        return StepFailed([request.request_id for request in output.requests], error)

    def _retire(self, request_id: str) -> None:
        """Drops what was kept for an ended request; its text and error stay until KEEP_ENDED others have ended."""
        self._on_text.pop(request_id, None)
        self._ended_ids[request_id] = None
        if len(self._ended_ids) > KEEP_ENDED:
            oldest = next(iter(self._ended_ids))
            del self._ended_ids[oldest]
            self.streams.pop(oldest, None)
            self.callback_errors.pop(oldest, None)

    def _is_known(self, request_id: str) -> bool:
        """Whether a request with this id is alive or in the trace, which could not tell a second one from the first."""
        return request_id in self.scheduler.requests or (
            self.trace is not None and request_id in self.trace.requests and request_id not in self.trace.rejected)

    def _why_not(self, request: Request, on_text: OnText | None) -> str | None:
        scheduler = self.scheduler
        pool_tokens = scheduler.kv.config.num_slots
        needed = f"{request.num_prompt_tokens} prompt + {request.sampling.max_tokens} new tokens"
        if self._is_known(request.request_id):
            return "that id was used before; ids must be unique within an engine"
        if request.status is not RequestStatus.WAITING or request.output_token_ids:
            return "it has run before; make a new Request of its prompt"
        if self.vocab_size is not None and not (min(request.prompt_token_ids) >= 0
                                                and max(request.prompt_token_ids) < self.vocab_size):
            return f"its prompt has token ids outside the vocabulary of 0 to {self.vocab_size - 1}"
        if request.max_total_tokens > scheduler.config.max_context_tokens:
            return f"{needed} exceed the model's context of {scheduler.config.max_context_tokens} tokens"
        if request.max_total_tokens > pool_tokens:
            return (f"{needed} exceed the KV pool of {pool_tokens} tokens: it could never finish; "
                    "shorten it or use more KV blocks")
        if (request.sampling.stop or on_text is not None) and self.tokenizer is None:
            return "stop strings and text callbacks need an engine with a tokenizer"
        return None

    def _record(self, output: SchedulerOutput, token_ids: Sequence[int | None], ended: list[Request], start_s: float,
                end_s: float, schedule_s: float) -> None:
        self._idle_steps = 0
        for request in ended:
            self._retire(request.request_id)
        if self.trace is None:
            return
        changes = output.kv_changes
        self.trace.append(StepRecord(
            step=output.step, start_s=start_s, duration_s=end_s - start_s, schedule_s=schedule_s,
            predicted_s=output.predicted_s if self.scheduler.latency.is_fitted else None,
            step_budget_s=output.step_budget_s, binding=output.binding,
            scheduled={request.request_id: count
                       for request, count in zip(output.requests, output.num_scheduled_tokens, strict=True)},
            emitted=[request.request_id for request, token_id in zip(output.requests, token_ids, strict=True)
                     if token_id is not None],
            finished={request.request_id: request.status.value for request in ended},
            preempted=output.preempted, slack_s=output.slack_s, left_out=output.left_out,
            num_behind=output.num_behind, block_changes=changes.block_changes, offloaded=changes.offloaded,
            copied={"checkpoint": len(changes.copies.checkpoint), "restore": len(changes.copies.restore),
                    "relocate": len(changes.copies.relocate)},
            recomputed_tokens=output.recomputed_tokens, num_waiting=output.num_waiting,
            num_running=output.num_running, used_blocks=output.num_used_blocks))
