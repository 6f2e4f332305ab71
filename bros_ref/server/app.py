"""The routes of the engine, and the application that holds all routes together. No scheduling rule lives here.

    request -> measure and authorise (middleware) -> route -> Service -> EngineLoop -> engine
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from bros_ref.server.batch_routes import batch_routes
from bros_ref.server.errors import APIError, ErrorBody, install_error_handlers, not_found
from bros_ref.server.files import file_routes
from bros_ref.server.live import live_routes
from bros_ref.server.middleware import Gateway
from bros_ref.server.protocol import ChatBody, CompletionBody
from bros_ref.server.responses import response_routes
from bros_ref.server.service import Service, unless_disconnected
from bros_ref.server.state import ServerState

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in (
        (400, "the request is wrong; the message says what"), (401, "no or a wrong API key"), (404, "no such thing"),
        (405, "wrong method"), (413, "the body is too large"), (422, "never sent; stands for 400"),
        (429, "too many best-effort requests wait"), (500, "the engine failed"),
        (503, "too many real-time requests wait, or the target is out of reach"))}


def create_app(state: ServerState) -> FastAPI:
    """The application over a server's parts. Its lifespan starts and stops them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.start()
        try:
            yield
        finally:
            await state.stop()

    app = FastAPI(title="bros_ref", summary="Real-time and best-effort requests on one model, one KV cache.",
                  version="1", lifespan=lifespan, responses=ERRORS, redirect_slashes=False,
                  telemetry={"tracing": False})
    install_error_handlers(app)
    app.add_middleware(Gateway, settings=state.settings, metrics=state.metrics)
    app.include_router(completion_routes(state.service))
    app.include_router(response_routes(state.service))
    app.include_router(file_routes(state.files))
    app.include_router(batch_routes(state.batches, state.runner))
    app.include_router(live_routes(state.live, state.trace, state.batches, state.settings.model_id))
    app.include_router(status_routes(state))
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]  # FastAPI's own way to change it
    return app


def _openapi(app: FastAPI, generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's page. It gives errors the media type of the route's answers, but ours are JSON on pages of HTML too."""
    if app.openapi_schema is None:
        for operations in generate()["paths"].values():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if int(status) >= 400 and "content" in response:
                        [content] = response["content"].values()
                        response["content"] = {"application/json": content}
    assert app.openapi_schema is not None
    return app.openapi_schema


def completion_routes(service: Service) -> APIRouter:
    """Chat and completions, and the model they name."""
    router = APIRouter(prefix="/v1", tags=["completions"])
    model = {"id": service.settings.model_id, "object": "model", "created": int(time.time()), "owned_by": "bros_ref"}

    async def answer(body: ChatBody | CompletionBody, http: Request) -> Response:
        plan = await service.plan(body, dict(http.headers))
        if body.stream:
            return await service.stream(body, plan)
        return JSONResponse(await unless_disconnected(http, service.whole(body, plan)))

    @router.post("/chat/completions", response_class=JSONResponse)
    async def chat(body: ChatBody, http: Request) -> Response:
        """The next turn of a conversation."""
        return await answer(body, http)

    @router.post("/completions", response_class=JSONResponse)
    async def completion(body: CompletionBody, http: Request) -> Response:
        """The continuation of one text, or of each of several."""
        return await answer(body, http)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model]}

    @router.get("/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        """The model, by name."""
        if model_id != model["id"]:
            raise not_found("model", model_id)
        return model

    return router


def status_routes(state: ServerState) -> APIRouter:
    """Whether the server works, and how well."""
    router = APIRouter(tags=["status"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the engine can work."""
        if state.loop.broken is not None:
            raise APIError(503, f"the engine is broken, restart the server: {state.loop.broken}", code="engine_broken")
        return {"status": "ok"}

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        content, kind = await state.metrics_page()
        return Response(content, media_type=kind)

    return router
