"""Runs a planned call on the engine and gives its answer, whole or as server-sent events.

It knows the engine's loop and the shapes of answers, but no routes and no files. Invariant: however a call ends
(completion, an error, the client's disconnect, a cancelled task), none of its requests stays in the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bros_ref.request import TokenLogprob
from bros_ref.server.calls import Plan, Planner
from bros_ref.server.engine_loop import EngineLoop
from bros_ref.server.errors import APIError
from bros_ref.server.generation import Call, Ended
from bros_ref.server.protocol import ChatBody, CompletionBody
from bros_ref.server.settings import ServerSettings
from bros_ref.server.shapes import ChatShape, Choice, CompletionShape

Result = TypeVar("Result")
SHORT_BODY_BYTES = 8192  # about a millisecond of tokenizing
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Shape(Protocol):
    """How a call's answer looks; see `shapes.py`."""

    def whole(self, choices: list[Choice]) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None: ...

    def piece(self, index: int, text: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]: ...

    def closing(self, index: int, reason: str | None) -> dict[str, Any]: ...

    def usage_chunk(self, choices: list[Choice]) -> dict[str, Any]: ...


class Service:
    """Answers calls.

    Attributes:
        loop: the engine's thread.
        planner: turns bodies into plans.
    """

    def __init__(self, loop: EngineLoop, planner: Planner, settings: ServerSettings) -> None:
        self.loop, self.planner, self.settings = loop, planner, settings

    def shape(self, body: ChatBody | CompletionBody, plan: Plan) -> Shape:
        """The shape of the answer to a body."""
        if isinstance(body, ChatBody):
            return ChatShape(plan, self.planner.tokenizer)
        return CompletionShape(plan, self.planner.tokenizer)

    async def plan(self, body: ChatBody | CompletionBody, headers: dict[str, str]) -> Plan:
        """The plan of a call. A long prompt is tokenized in a thread, so that it delays no other call; for a short one
        switching threads would take longer than the work. Raises APIError."""
        arrival_s = self.loop.now_s()
        make: Callable[[], Plan]
        if isinstance(body, ChatBody):
            make = partial(self.planner.chat, body, headers, arrival_s)
        else:
            make = partial(self.planner.completion, body, headers, arrival_s)
        length = headers.get("content-length", "")
        return make() if length.isdecimal() and int(length) <= SHORT_BODY_BYTES else await asyncio.to_thread(make)

    async def begin(self, plan: Plan) -> Call:
        """Gives all requests of a plan to the engine. Raises APIError if one was refused; then none runs."""
        call = Call(plan.requests, self.settings.max_buffered_pieces)
        try:
            await asyncio.gather(*(self.loop.submit(generation) for generation in call.generations))
        except BaseException:
            self.abandon(call)
            raise
        return call

    def abandon(self, call: Call) -> None:
        """Aborts the requests of a call that are still running."""
        for generation in call.generations:
            self.loop.abort(generation)

    async def whole(self, body: ChatBody | CompletionBody, plan: Plan) -> dict[str, Any]:
        """The complete answer. Raises APIError if a choice failed."""
        return self.shape(body, plan).whole(await self.choices(plan))

    async def choices(self, plan: Plan) -> list[Choice]:
        """All choices of a plan, once they have ended. Raises APIError if one failed."""
        call = await self.begin(plan)
        choices = [Choice() for _ in plan.requests]
        try:
            async for index, item in call.items():
                if isinstance(item, Ended):
                    if item.error is not None:
                        raise item.error
                    choices[index].finish_reason, choices[index].num_tokens = item.finish_reason, item.num_tokens
                else:
                    choices[index].text += item.text
                    choices[index].logprobs += item.logprobs
        finally:
            self.abandon(call)
        return choices

    async def stream(self, body: ChatBody | CompletionBody, plan: Plan) -> StreamingResponse:
        """The answer as server-sent events. The requests are in the engine before the first byte is sent, so a full
        queue is an HTTP status and not an event. Raises APIError."""
        call = await self.begin(plan)
        shape = self.shape(body, plan)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage

        async def events() -> AsyncIterator[str]:
            choices = [Choice() for _ in plan.requests]
            with_usage: dict[str, Any] = {"usage": None} if wants_usage else {}
            for index in range(len(choices)):
                if (opening := shape.opening(index)) is not None:
                    yield event(opening | with_usage)
            async for index, item in call.items():
                if not isinstance(item, Ended):
                    yield event(shape.piece(index, item.text, item.logprobs) | with_usage)
                elif item.error is not None:
                    yield event(item.error.body())
                    return
                else:
                    choices[index].num_tokens = item.num_tokens
                    yield event(shape.closing(index, item.finish_reason) | with_usage)
            if wants_usage:
                yield event(shape.usage_chunk(choices))
            yield "data: [DONE]\n\n"

        return EventStream(events(), lambda: self.abandon(call))


class EventStream(StreamingResponse):
    """Server-sent events. `on_close` is called when they end, however they end; a generator's own `finally` would not
    run if the client left before the first event, or while one was being sent."""

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=SSE_HEADERS)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'), allow_nan=False)}\n\n"


async def unless_disconnected(http: HTTPRequest, answer: Awaitable[Result]) -> Result:
    """Waits for an answer, but cancels it when the client goes away. The body must have been read before.

    Raises:
        APIError: the client has gone, so no one will see the error.
    """
    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(499, "the client has gone", code="disconnected")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
