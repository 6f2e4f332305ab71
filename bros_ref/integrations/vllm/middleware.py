"""Gives vLLM's HTTP server the conventions of `bros-ref serve`:

    vllm serve MODEL --scheduler-cls bros_ref.integrations.vllm.BROSScheduler \\
                     --middleware bros_ref.integrations.vllm.middleware.RequestClassMiddleware

A request without `service_tier`, or with `auto`, `default`, `priority` or `fast`, is real-time; `flex` is best-effort.
The headers `x-slo-ttft-ms` and `x-slo-tpot-ms` are targets of a real-time request. They are passed on as `vllm_xargs`.
Values that the body itself has there take precedence. Invalid arguments are rejected with status 400.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from bros_ref.integrations.vllm.parameters import Settings, class_and_slo

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
TIERS = {"auto": "rt", "default": "rt", "priority": "rt", "fast": "rt", "flex": "be"}
HEADERS = {"x-slo-ttft-ms": "ttft_slo_s", "x-slo-tpot-ms": "tpot_slo_s"}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def with_class(body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """The body of a request with its class, and its targets if it has any, in `vllm_xargs`.

    Raises:
        ValueError: the tier or class is unknown, a target is not a positive number, or a best-effort request has one.
    """
    arguments = body.get("vllm_xargs") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"vllm_xargs must be an object, got {arguments!r}")
    tier = body.get("service_tier") or "auto"
    if tier not in TIERS:
        raise ValueError(f"service_tier must be one of {', '.join(TIERS)}, got {tier!r}")
    found: dict[str, Any] = {}
    if not {"bros_class", *HEADERS.values()} & set(arguments):
        found["bros_class"] = TIERS[tier]
        for header, key in HEADERS.items():
            if header in headers:
                try:
                    found[key] = float(headers[header]) / 1000
                except ValueError:
                    raise ValueError(f"{header} must be a number of milliseconds, got {headers[header]!r}") from None
    arguments = {**found, **arguments}
    class_and_slo(arguments, Settings())
    return {**body, "vllm_xargs": arguments}


class RequestClassMiddleware:
    """For vLLM's `--middleware`; see the module's docstring."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        raw, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has disconnected
                return
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            body = json.loads(raw)
        except ValueError:
            body = None  # vLLM reports what is wrong with it
        if isinstance(body, dict):
            try:
                raw = json.dumps(with_class(body, headers)).encode()
            except ValueError as error:
                await _refuse(send, str(error))
                return
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        await self.app({**scope, "headers": [*others, (b"content-length", str(len(raw)).encode())]},
                       _replay(raw, receive), send)


def _replay(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the whole body first, and then passes on later messages, such as a disconnect."""
    is_new = True

    async def replay() -> Message:
        nonlocal is_new
        if is_new:
            is_new = False
            return {"type": "http.request", "body": raw, "more_body": False}
        return await receive()

    return replay


async def _refuse(send: Send, message: str) -> None:
    """Status 400 in the form of OpenAI's errors."""
    raw = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None,
                                "code": None}}).encode()
    await send({"type": "http.response.start", "status": 400,
                "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]})
    await send({"type": "http.response.body", "body": raw})
