"""The parts of a running server, put together and taken apart in the right order."""

from __future__ import annotations

import asyncio

from bros_ref.engine.build import LoadedModel
from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.server.admission import Gate
from bros_ref.server.batch_runner import BatchRunner
from bros_ref.server.batches import Batches
from bros_ref.server.calls import Planner
from bros_ref.server.engine_loop import EngineLoop
from bros_ref.server.files import Files
from bros_ref.server.live import Live
from bros_ref.server.metrics import Metrics
from bros_ref.server.recent import RecentTrace
from bros_ref.server.service import Service
from bros_ref.server.settings import ServerSettings
from bros_ref.server.store import Store

DRAIN_POLL_S = 0.05


class ServerState:
    """Everything that lives as long as the server.

    Args:
        engine: a fresh engine with a trace, whose header is kept and whose steps are bounded from here on.
    """

    def __init__(self, engine: LLMEngine, loaded: LoadedModel, settings: ServerSettings) -> None:
        assert engine.trace is not None
        self.settings = settings
        self.metrics = Metrics()
        self.trace = engine.trace = RecentTrace(engine.trace, on_step=self.metrics.step)
        self.loop = EngineLoop(engine, Gate(settings), self.metrics)
        planner = Planner(loaded, settings, engine.scheduler.kv.config.num_slots)
        self.service = Service(self.loop, planner, settings)
        self.store = Store(settings.data_dir)
        self.files, self.batches = Files(self.store), Batches(self.store)
        self.live = Live(self.loop, self.metrics)
        self.runner = BatchRunner(self.batches, self.store, self.service, settings.batch_lines_in_flight)

    async def start(self) -> None:
        """Starts the engine's thread, and goes on with the batches that have not ended."""
        self.loop.start()
        self.runner.start()

    async def drain(self) -> None:
        """Takes no new requests and ends the best-effort ones; lines of batches go back to waiting."""
        self.live.closing = True
        await self.runner.stop()
        self.loop.drain()

    async def stop(self) -> None:
        """Finishes real-time requests within the bound, then aborts the rest."""
        await self.drain()
        deadline_s = self.loop.now_s() + self.settings.drain_s
        while self.loop.num_live(is_rt=True) and self.loop.now_s() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
        await self.loop.stop()
        await asyncio.to_thread(self.store.close)

    async def metrics_page(self) -> tuple[bytes, str]:
        """The page for Prometheus, with the state of the engine as it is between two steps."""
        await self.loop.call(self.metrics.read_engine)
        self.metrics.batch_lines(await asyncio.to_thread(self.batches.counts))
        return self.metrics.page()
