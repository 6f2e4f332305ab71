"""The dashboard's data: the pool and the queues, a few times per second, and the last seconds as a trace. One frame
serves all viewers; it is made in the engine's thread between two steps, and only while there are viewers."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response

from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.server.batches import Batches
from bros_ref.server.engine_loop import EngineLoop
from bros_ref.server.errors import APIError
from bros_ref.server.metrics import Metrics
from bros_ref.server.recent import RecentTrace
from bros_ref.server.service import EventStream, event
from bros_ref.viz.figures.style import REASON_LABELS
from bros_ref.viz.widgets.html import packed_fills, script_json
from bros_ref.viz.widgets.player import COLOURS, POOL_LABELS, POOL_LOOKS
from bros_ref.viz.widgets.schedule_player import SchedulePlayer

FRAME_S = 0.5
MAX_VIEWERS = 16
MAX_SCHEDULE_S = 60
SHOWN_BATCHES = 5
Seconds = Annotated[float, Query(gt=0, le=3600, allow_inf_nan=False)]


class Live:
    """Frames for viewers."""

    def __init__(self, loop: EngineLoop, metrics: Metrics) -> None:
        self._loop, self._metrics = loop, metrics
        self._frame: dict[str, Any] = {}
        self._made_s = -FRAME_S
        self._making = asyncio.Lock()
        self.viewers = 0
        self.closing = False  # the server shuts down: viewers must not keep it waiting

    async def frame(self) -> dict[str, Any]:
        """The newest frame, at most FRAME_S old."""
        async with self._making:
            if self._loop.now_s() - self._made_s >= FRAME_S:
                self._frame = await self._loop.call(self._read)
                self._made_s = self._loop.now_s()
        return self._frame

    def _read(self, engine: LLMEngine) -> dict[str, Any]:
        scheduler = engine.scheduler
        owners: dict[str, int] = {}

        def number(name: str | None) -> int:
            return -1 if name is None else owners.setdefault(name, len(owners))

        blocks: list[int] = []
        for block_id, view in enumerate(scheduler.kv.snapshot()):
            if view.state != "empty":
                blocks += [block_id, number(view.rt_owner), view.rt_index, view.rt_fill, number(view.be_owner),
                           view.be_index, view.be_fill, view.overwritten]
        running = {request.request_id for request in scheduler.running}
        counts = Counter((request.is_rt, name in running) for name, request in scheduler.requests.items())
        output = scheduler.output
        reasons = Counter(REASON_LABELS[reason] for reason in output.left_out.values())
        if output.num_behind:
            reasons[REASON_LABELS["behind"]] += output.num_behind
        slacks = output.slack_s.values() if scheduler.requests else ()
        return {"time_s": engine.clock.now_s(), "step": scheduler.step, "blocks": blocks, "owners": list(owners),
                "running": [counts[True, True], counts[False, True]],
                "waiting": [counts[True, False], counts[False, False]],
                "reasons": dict(reasons) if scheduler.requests else {},
                "slack_s": min(slacks, default=None), "used": scheduler.kv.num_used_blocks,
                **self._metrics.totals()}


def live_routes(live: Live, trace: RecentTrace, batches: Batches, model_id: str) -> APIRouter:
    """The dashboard's page, its events and the trace of the last seconds."""
    router = APIRouter(tags=["dashboard"])

    @router.get("/dashboard", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The page; it carries no data."""
        return HTMLResponse(dashboard_page(trace, model_id))

    @router.get("/dashboard/events", response_class=Response)
    async def events(http: Request) -> Response:
        """Frames as server-sent events."""
        if live.viewers >= MAX_VIEWERS:
            raise APIError(503, f"{MAX_VIEWERS} dashboards are open, which is the limit; close one")
        live.viewers += 1
        owner = http.state.owner

        async def frames() -> AsyncIterator[str]:
            while not live.closing:
                shown = (await asyncio.to_thread(batches.page, owner, None, SHOWN_BATCHES))["data"]
                rows = [{"id": one["id"], "status": one["status"], **one["request_counts"]} for one in shown]
                yield event(await live.frame() | {"batches": rows})
                await asyncio.sleep(FRAME_S)

        def closed() -> None:
            live.viewers -= 1

        return EventStream(frames(), closed)

    @router.get("/dashboard/schedule", response_class=HTMLResponse)
    async def schedule(seconds: Annotated[float, Query(gt=0, le=MAX_SCHEDULE_S, allow_inf_nan=False)] = 10
                       ) -> HTMLResponse:
        """The schedule of the last seconds, step by step, as the notebooks show it."""
        try:
            content = await asyncio.to_thread(lambda: SchedulePlayer(trace.cut(seconds)).to_html())
        except ValueError as error:
            raise APIError(404, "no step was taken yet; send a request first", code="no_steps") from error
        return HTMLResponse(content)

    @router.get("/v1/trace", response_class=Response)
    async def recent(seconds: Seconds = 60) -> Response:
        """The last seconds as a trace file, for `Trace.load` and every widget. It holds sizes and times, no text."""
        content = await asyncio.to_thread(_trace_file, trace, seconds)
        return Response(content, media_type="application/json",
                        headers={"content-disposition": 'attachment; filename="trace.json"'})

    return router


def _trace_file(trace: RecentTrace, seconds: float) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.cut(seconds).save(path)
        return path.read_bytes()


def dashboard_page(trace: RecentTrace, model_id: str) -> str:
    """The page with its scripts and the constants they need; nothing is fetched from elsewhere."""
    static = files("bros_ref.viz").joinpath("static")
    data = {"block_size": trace.block_size, "num_blocks": trace.num_blocks, "colours": COLOURS, "model": model_id,
            "policy": trace.policy, "looks": packed_fills(POOL_LOOKS), "labels": POOL_LABELS}
    scripts = "\n".join(static.joinpath(name).read_text(encoding="utf-8")
                        for name in ("controls.js", "pool.js", "live.js"))
    page = static.joinpath("live.html").read_text(encoding="utf-8").replace("/*SCRIPT*/", scripts)
    return page.replace("/*DATA*/", script_json(data))
