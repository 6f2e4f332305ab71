"""`POST /v1/responses`: text in, text out, whole or as typed events. A thin form of a chat call.

Answers are not kept, so `previous_response_id` is refused by name, as are tools, reasoning, images and background runs:
the body has no such fields. `store` has no effect.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from bros_ref.server.calls import Plan
from bros_ref.server.generation import Ended
from bros_ref.server.protocol import Body, ChatBody, Message, ServiceTier, SLOBody, Text, TextFormat
from bros_ref.server.service import EventStream, Service, event, unless_disconnected
from bros_ref.server.shapes import Choice


class InputMessage(Message):
    """A turn of the conversation; an answer of ours may come back as it was."""

    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None


class TextOptions(Body):
    """The only output format there is."""

    format: TextFormat | None = None


class ResponsesBody(Body):
    """What is supported of the body."""

    model: str = Field(max_length=256)
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    service_tier: ServiceTier | None = None
    slo: SLOBody | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def as_chat(self) -> ChatBody:
        """The same call for the chat endpoint."""
        turns = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else [
            {"role": turn.role, "content": turn.text} for turn in self.input]
        if self.instructions:
            turns.insert(0, {"role": "system", "content": self.instructions})
        return ChatBody.model_validate({
            "model": self.model, "messages": turns, "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "service_tier": self.service_tier, "slo": self.slo})


class ResponseShape:
    """The response object and its parts at any moment."""

    def __init__(self, body: ResponsesBody, plan: Plan) -> None:
        self.body, self.plan = body, plan
        self.item_id = f"msg_{secrets.token_hex(16)}"
        self.response_id = f"resp_{plan.call_id.partition('-')[2]}"

    def response(self, status: str, choice: Choice | None = None, error: dict[str, Any] | None = None
                 ) -> dict[str, Any]:
        """The whole object. `choice`: the answer, once it is complete."""
        body, plan = self.body, self.plan
        usage, output = None, []
        if choice is not None:
            usage = {"input_tokens": plan.num_prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
                     "output_tokens": choice.num_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                     "total_tokens": plan.num_prompt_tokens + choice.num_tokens}
            output = [self.item(status, choice.text)]
        return {
            "id": self.response_id, "object": "response", "created_at": plan.created, "status": status, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": plan.model,
            "output": output, "parallel_tool_calls": False, "previous_response_id": None, "store": False,
            "reasoning": {"effort": None, "summary": None}, "service_tier": plan.service_tier,
            "temperature": 1.0 if body.temperature is None else body.temperature, "tool_choice": "none", "tools": [],
            "text": {"format": {"type": "text"}}, "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled", "usage": usage, "user": body.user, "metadata": body.metadata or {}}

    def item(self, status: str, text: str | None = None) -> dict[str, Any]:
        """The one output item: a message."""
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status,
                "content": [] if text is None else [part(text)]}


def part(text: str) -> dict[str, Any]:
    """The one content part of the message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def response_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", tags=["responses"])

    @router.post("/responses", response_class=JSONResponse)
    async def create(body: ResponsesBody, http: Request) -> Response:
        """An answer to a text or a conversation."""
        plan = await service.plan(body.as_chat(), dict(http.headers))
        shape = ResponseShape(body, plan)
        if body.stream:
            return await _stream(service, plan, shape)
        [choice] = await unless_disconnected(http, service.choices(plan))
        return JSONResponse(shape.response(_status(choice), choice))

    return router


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


async def _stream(service: Service, plan: Plan, shape: ResponseShape) -> EventStream:
    """The typed events of a response. Raises APIError if the engine refuses it."""
    call = await service.begin(plan)

    async def contents() -> AsyncIterator[dict[str, Any]]:
        where = {"item_id": shape.item_id, "output_index": 0, "content_index": 0}
        choice = Choice()
        yield {"type": "response.created", "response": shape.response("in_progress")}
        yield {"type": "response.in_progress", "response": shape.response("in_progress")}
        yield {"type": "response.output_item.added", "output_index": 0, "item": shape.item("in_progress")}
        yield {"type": "response.content_part.added", **where, "part": part("")}
        async for _, item in call.items():
            if not isinstance(item, Ended):
                if not item.text:
                    continue
                choice.text += item.text
                yield {"type": "response.output_text.delta", **where, "delta": item.text, "logprobs": []}
            elif item.error is not None:
                error = {"code": "server_error", "message": item.error.message}
                yield {"type": "response.failed", "response": shape.response("failed", None, error)}
                return
            else:
                choice.finish_reason, choice.num_tokens = item.finish_reason, item.num_tokens
        status = _status(choice)
        yield {"type": "response.output_text.done", **where, "text": choice.text, "logprobs": []}
        yield {"type": "response.content_part.done", **where, "part": part(choice.text)}
        yield {"type": "response.output_item.done", "output_index": 0, "item": shape.item(status, choice.text)}
        yield {"type": f"response.{status}", "response": shape.response(status, choice)}

    async def events() -> AsyncIterator[str]:
        number = 0
        async for content in contents():
            yield f"event: {content['type']}\n{event(content | {'sequence_number': number})}"
            number += 1

    return EventStream(events(), lambda: service.abandon(call))
