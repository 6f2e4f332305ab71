"""The thread that owns the engine. No other thread touches it.

    coroutines --commands--> [queue] --> add, abort, call --> step --> items, once per step --> event loop

Commands are taken before every step, so an abort takes effect within one step. With nothing to do the thread blocks on
the queue. No scheduling rule lives here. Invariant: every submitted generation ends, with a reason or with an
error, even if a step or a command raises.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

from bros_ref.engine.llm_engine import LLMEngine, RequestRefused, StepFailed
from bros_ref.engine.ranks import RankFailed
from bros_ref.request import Request, RequestStatus
from bros_ref.server.errors import APIError
from bros_ref.server.generation import Ended, Generation, Piece

Result = TypeVar("Result")
FINISH_REASONS = {RequestStatus.FINISHED_LENGTH: "length", RequestStatus.FINISHED_STOP: "stop"}
SHUTTING_DOWN = "the server is shutting down; try again when it is back"
REJECTED = "the scheduling policy turned this request away: it could not be served within its targets"
GateKeeper = Callable[[LLMEngine, Request, int], APIError | None]
log = logging.getLogger(__name__)


class Observer(Protocol):
    """Receives the loop's measurements; called in the engine's thread."""

    def token(self, request: Request, gap_s: float | None) -> None: ...

    def ended(self, request: Request, outcome: str) -> None: ...


class EngineLoop:
    """Runs an engine in a thread of its own.

    Attributes:
        broken: why the engine can take no more steps, if it cannot; then every request is refused.

    Args:
        gate: asked before a request is added, with the number of its class that still wait for their first token; an
            error it returns refuses the request.
        observer: told of tokens and ends.
    """

    def __init__(self, engine: LLMEngine, gate: GateKeeper, observer: Observer) -> None:
        self._engine, self._gate, self._observer = engine, gate, observer
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[str, Generation] = {}
        self._texts: defaultdict[str, str] = defaultdict(str)
        self._last_token_s: dict[str, float] = {}
        self._draining = self._stopping = False
        self.broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- for coroutines ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def now_s(self) -> float:
        """Seconds on the engine's clock, which only goes forward."""
        return self._engine.clock.now_s()

    async def submit(self, generation: Generation) -> None:
        """Gives the request to the engine; returns once it was taken.

        Raises:
            APIError: it was refused.
        """
        self._commands.put(lambda: self._add(generation))
        if (error := await generation.admitted) is not None:
            raise error

    def abort(self, generation: Generation) -> None:
        """Ends a request before the next step; one that has ended already stays as it is."""
        self._commands.put(lambda: self._abort(generation, None))

    async def call(self, function: Callable[[LLMEngine], Result]) -> Result:
        """Runs a short function between two steps and returns its result."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._engine))
            except Exception as error:
                future.set_exception(error)

        self._commands.put(run)
        return await asyncio.wrap_future(future)

    def drain(self) -> None:
        """Takes no more requests, and ends the best-effort ones: real-time ones may finish."""
        self._commands.put(self._drain)

    async def stop(self) -> None:
        """Aborts what still runs, and returns when the thread has ended."""
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def num_live(self, *, is_rt: bool) -> int:
        """Requests of a class that have not ended."""
        return sum(generation.request.is_rt == is_rt for generation in list(self._live.values()))

    # -- in the engine's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._take_commands()
            if self._stopping:
                break
            if self._engine.has_unfinished:
                self._step()

    def _take_commands(self) -> None:
        block = not self._engine.has_unfinished
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return
            block = False
            try:
                command()
            except Exception:
                log.exception("a command of the engine's thread failed")

    def _add(self, generation: Generation) -> None:
        request, error = generation.request, None
        waiting = sum(other.request.is_rt == request.is_rt and other.request.first_token_s is None
                      for other in self._live.values())
        if self.broken is not None:
            error = APIError(503, f"the engine is broken, restart the server: {self.broken}", code="engine_broken")
        elif self._draining:
            error = APIError(503, SHUTTING_DOWN, code="shutting_down")
        else:
            error = self._gate(self._engine, request, waiting)
        if error is None:
            try:
                self._engine.add_request(request, self._on_text)
                self._live[request.request_id] = generation
            except RequestRefused as refusal:
                error = APIError(400, str(refusal), code="refused")
            except Exception as bug:
                log.exception("add_request failed")
                error = APIError(500, f"the engine failed with {type(bug).__name__}")
        _to_loop(generation.loop, [lambda: generation.settle(error)])

    def _abort(self, generation: Generation, error: APIError | None) -> None:
        request = generation.request
        if self._live.get(request.request_id) is not generation:
            return
        self._engine.abort(request.request_id)
        self._end(generation, "aborted", error or APIError(499, "the request was aborted", code="aborted"))

    def _drain(self) -> None:
        self._draining = True
        self._abort_all(APIError(503, SHUTTING_DOWN, code="shutting_down"), but_rt=True)

    def _stop(self) -> None:
        self._draining = self._stopping = True
        self._abort_all(APIError(503, SHUTTING_DOWN, code="shutting_down"))

    def _abort_all(self, error: APIError, *, but_rt: bool = False) -> None:
        for generation in list(self._live.values()):
            if not (but_rt and generation.request.is_rt):
                self._abort(generation, error)

    def _on_text(self, request: Request, piece: str) -> None:
        self._texts[request.request_id] += piece

    def _step(self) -> None:
        try:
            ended = self._engine.step()
        except StepFailed as failure:
            log.error("%s", failure)
            if isinstance(failure.__cause__, RankFailed):
                self.broken = str(failure.__cause__)
            cause = type(failure.__cause__).__name__
            message = f"the engine step that computed this request failed ({cause}); try again"
            for request_id in failure.failed:
                if (generation := self._live.get(request_id)) is not None:
                    self._end(generation, "failed", APIError(500, message, code="step_failed"))
            return
        except Exception as bug:  # a fault of a policy or of the accounts: nobody may wait for ever
            log.exception("the engine failed outside a forward pass")
            self._abort_all(APIError(500, f"the engine failed with {type(bug).__name__}", code="engine_failed"))
            return
        for request_id in self._engine.aborted & self._live.keys():  # a policy that rejects turned them away
            self._end(self._live[request_id], "aborted", APIError(503, REJECTED, code="rejected"))
        self._hand_out(ended)

    def _hand_out(self, ended: list[Request]) -> None:
        """Passes all results of a step to the event loop in one call."""
        ended_ids = {request.request_id for request in ended}
        news: list[tuple[Generation, Piece]] = []
        for request in self._engine.scheduler.output.requests:
            generation = self._live.get(request.request_id)
            if generation is None or request.last_token_s is None:
                continue
            before_s = self._last_token_s.get(request.request_id)
            if before_s == request.last_token_s:
                continue  # a part of a prompt: no token came of it
            self._observer.token(request, None if before_s is None else request.last_token_s - before_s)
            self._last_token_s[request.request_id] = request.last_token_s
            text, logprobs = self._texts.pop(request.request_id, ""), tuple(request.logprobs)
            request.logprobs.clear()
            news.append((generation, Piece(text, logprobs)))
        if news:
            _to_loop(news[0][0].loop, [lambda: self._push(news)])
        for request_id in ended_ids & self._live.keys():
            self._finish(self._live[request_id])

    def _push(self, news: list[tuple[Generation, Piece]]) -> None:
        """In the event loop: hands over pieces, and aborts generations that are not being read."""
        for generation, piece in news:
            if not generation.push(piece):
                self._commands.put(partial(self._abort, generation, APIError(
                    500, "the client reads too slowly; the request was aborted", code="slow_client")))

    def _finish(self, generation: Generation) -> None:
        request = generation.request
        reason = FINISH_REASONS.get(request.status)
        if reason is None:
            cause = type(request.error).__name__
            self._end(generation, "failed", APIError(500, f"this request failed ({cause})", code="request_failed"))
        else:
            self._end(generation, reason, None)

    def _end(self, generation: Generation, outcome: str, error: APIError | None) -> None:
        request = generation.request
        del self._live[request.request_id]
        self._texts.pop(request.request_id, None)
        self._last_token_s.pop(request.request_id, None)
        self._observer.ended(request, outcome)
        end = Ended(None if error else outcome, len(request.output_token_ids), error)
        _to_loop(generation.loop, [lambda: generation.settle(error), lambda: generation.push(end)])


def _to_loop(loop: asyncio.AbstractEventLoop, calls: list[Callable[[], Any]]) -> None:
    """Runs the calls in the event loop, in order; does nothing if the loop is closed, as it has no reader left."""

    def run() -> None:
        for call in calls:
            call()

    try:
        loop.call_soon_threadsafe(run)
    except RuntimeError:
        log.debug("the event loop has ended")
