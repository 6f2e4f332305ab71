"""What every request passes first: its key is checked, headers and number of requests are bounded, its status counted.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bros_ref.server.errors import APIError
from bros_ref.server.metrics import Metrics
from bros_ref.server.settings import (
    FORM_OVERHEAD_BYTES,
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    MAX_UPLOAD_BYTES,
    ServerSettings,
)

OPEN_PATHS = frozenset({"/health", "/dashboard", "/docs", "/openapi.json"})  # pages without data of anybody


class Gateway:
    """ASGI middleware. `scope["state"]["owner"]` tells the routes who sent the request."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.http(getattr(route, "path", "other"), message["status"])
            await send(message)

        limit = MAX_UPLOAD_BYTES + FORM_OVERHEAD_BYTES if scope["path"] == "/v1/files" else MAX_BODY_BYTES
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413)
            return message

        try:
            self._authorise(scope, limit)
            if self._under_way >= self._settings.max_http_requests:
                raise APIError(503, f"{self._under_way} requests are under way, which is this server's limit; "
                                    "try again later", code="too_many_requests")
        except APIError as error:
            await error.response()(scope, receive, counted)
            return
        self._under_way += 1
        try:
            await self._app(scope, bounded, counted)
        finally:
            self._under_way -= 1

    def _authorise(self, scope: Scope, max_body_bytes: int) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise APIError(431, f"the headers exceed {MAX_HEADER_BYTES} bytes")
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        owner = self._settings.owner_of(headers.get(b"authorization"))
        if owner is None and scope["path"] not in OPEN_PATHS:
            raise APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > max_body_bytes:  # one that says nothing is cut off while it is read
            raise APIError(413, f"the body has {length} bytes; this address takes at most {max_body_bytes}")
        scope.setdefault("state", {})["owner"] = owner
