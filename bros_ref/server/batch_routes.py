"""`/v1/batches`: files of best-effort requests. A key sees its own batches only."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from bros_ref.server.batch_runner import BatchRunner
from bros_ref.server.batches import Batches
from bros_ref.server.protocol import Body

MAX_PAGE = 100


class BatchBody(Body):
    """`POST /v1/batches`."""

    input_file_id: str = Field(max_length=128)
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
                        Field(max_length=16)] | None = None


def batch_routes(batches: Batches, runner: BatchRunner) -> APIRouter:
    """The routes; work on disk is done in threads."""
    router = APIRouter(prefix="/v1/batches", tags=["batches"])

    @router.post("")
    async def create(http: Request, body: BatchBody) -> dict[str, Any]:
        """Starts a batch of an uploaded file; its lines are best-effort."""
        made = await asyncio.to_thread(batches.create, http.state.owner, body.endpoint, body.input_file_id,
                                       body.metadata)
        runner.wake()
        return made

    @router.get("")
    async def listing(http: Request, after: Annotated[str | None, Query(max_length=128)] = None,
                      limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20) -> dict[str, Any]:
        """The key's batches, the newest first."""
        return await asyncio.to_thread(batches.page, http.state.owner, after, limit)

    @router.get("/{batch_id}")
    async def one(http: Request, batch_id: str) -> dict[str, Any]:
        """One batch: its status, its counts, its files."""
        return await asyncio.to_thread(batches.get, http.state.owner, batch_id)

    @router.post("/{batch_id}/cancel")
    async def cancel(http: Request, batch_id: str) -> dict[str, Any]:
        """Ends a batch early; what is done stays, and is in its files."""
        cancelled = await asyncio.to_thread(batches.cancel, http.state.owner, batch_id)
        runner.wake()
        return cancelled

    return router
