"""Runs batches: lines go to the engine as best-effort requests, a few at a time; outcomes go to the store.

One coroutine decides and writes. All that it needs after a crash is in the store; in memory it keeps only which lines
are in flight. A line's place is free again only once its outcome is stored, so a full disk stops new lines and loses
none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bros_ref.server.batches import Batches, Job, Line, LineResult
from bros_ref.server.errors import APIError, from_validation
from bros_ref.server.protocol import ChatBody, CompletionBody
from bros_ref.server.service import Service
from bros_ref.server.store import Store

BODIES: dict[str, type[ChatBody] | type[CompletionBody]] = {
    "/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
MAX_CUSTOM_ID = 512
MAX_ATTEMPTS = 3  # for a line whose engine step failed
TICK_S = 1.0  # how often expiry is looked at
RETRY_S = 0.5  # after a full queue, or a store that cannot be written
Key = tuple[str, int]  # batch id, line number
log = logging.getLogger(__name__)


class BatchRunner:
    """Started and stopped with the server."""

    def __init__(self, batches: Batches, store: Store, service: Service, lines_in_flight: int) -> None:
        self._batches, self._store, self._service = batches, store, service
        self._lines_in_flight = lines_in_flight
        self._running: dict[Key, asyncio.Task[LineResult | None]] = {}
        self._attempts: Counter[Key] = Counter()
        self._wake = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, or goes on where the last server stopped."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stores what is finished and leaves the rest for the next start."""
        if self._task is None:
            return
        self._stopping = True  # no cancellation: it can be lost where it meets the end of a wait (Python 3.11)
        self.wake()
        await self._task
        self._task = None
        finished = [task.result() for task in self._running.values() if task.done() and not task.cancelled()]
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._running.clear()
        try:
            await asyncio.to_thread(self._batches.finish, [result for result in finished if result is not None])
        except (sqlite3.Error, OSError) as error:  # they run again at the next start
            log.error("finished lines could not be stored: %s", error)

    def wake(self) -> None:
        """Something has changed: a new batch, a cancellation."""
        self._wake.set()

    # -- one round after another ------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                await self._store_results()
                jobs = await asyncio.to_thread(self._batches.jobs)
                for job in jobs:
                    await self._advance(job)
            except (sqlite3.Error, OSError) as error:  # the disk is full, say; nothing is lost, nothing new begins
                log.error("batches wait, the store cannot be used: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            except Exception:
                log.exception("a round of the batch runner failed")
                await asyncio.sleep(RETRY_S)
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 0 if self._stopping else TICK_S)

    async def _advance(self, job: Job) -> None:
        """Advances a batch as far as possible now."""
        if job.status == "validating":
            await asyncio.to_thread(self._validate, job)
            self.wake()
        elif job.status == "cancelling":
            await self._close(job, "cancelled", "the batch was cancelled before this line ran")
        elif job.status == "finalizing":
            await asyncio.to_thread(self._batches.end, job.batch_id, "completed")
        elif job.expires_at <= time.time():
            await self._close(job, "expired", "the batch's completion window passed before this line ran")
        else:
            await self._fill(job)

    async def _fill(self, job: Job) -> None:
        """Starts lines while places are free, and ends the batch when no line is left."""
        places = self._lines_in_flight - len(self._running)
        mine = sum(key[0] == job.batch_id for key in self._running)
        if places <= 0 and mine:
            return
        lines = await asyncio.to_thread(self._batches.waiting, job.batch_id, 0, mine + max(1, places))
        for line in lines:
            key = (job.batch_id, line.number)
            if key not in self._running and len(self._running) < self._lines_in_flight:
                self._running[key] = task = asyncio.create_task(self._answer(job, line))
                task.add_done_callback(lambda _: self.wake())
        if not lines:
            await asyncio.to_thread(self._batches.start_ending, job.batch_id)
            self.wake()

    async def _close(self, job: Job, state: str, message: str) -> None:
        tasks = [self._running.pop(key) for key in list(self._running) if key[0] == job.batch_id]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._batches.close_lines, job.batch_id, state, message)
        await asyncio.to_thread(self._batches.end, job.batch_id, state)

    async def _store_results(self) -> None:
        """One transaction for all lines that are done by now; then their places are free."""
        done = {key: task for key, task in self._running.items() if task.done()}
        results = [result for task in done.values() if (result := task.result()) is not None]
        if results:
            await asyncio.to_thread(self._batches.finish, results)
        for key in done:
            del self._running[key]
        for result in results:
            self._attempts.pop((result.batch_id, result.number), None)

    # -- one line ---------------------------------------------------------------------------------------------

    async def _answer(self, job: Job, line: Line) -> LineResult | None:
        """The outcome of a line; None if it has to run again."""
        key = (job.batch_id, line.number)
        try:
            body = parse_body(job.endpoint, await asyncio.to_thread(self._batches.read, job, line))
            plan = await self._service.plan(body, {})
            return LineResult(*key, 200, await self._service.whole(body, plan))
        except APIError as error:
            if error.code in ("be_full", "shutting_down", "engine_broken"):  # no fault of the line
                await asyncio.sleep(RETRY_S)
                return None
            self._attempts[key] += 1
            if error.status >= 500 and self._attempts[key] < MAX_ATTEMPTS:
                return None
            return LineResult(*key, error.status, error.body())
        except OSError as error:
            log.error("the input file of %s cannot be read: %s", job.batch_id, error)
            await asyncio.sleep(RETRY_S)
            return None
        except Exception as bug:
            log.exception("a line of %s failed", job.batch_id)
            return LineResult(*key, 500, APIError(500, f"the server failed with {type(bug).__name__}").body())

    def _validate(self, job: Job) -> None:
        lines, errors = read_lines(self._store.content_path(job.input_file_id), job.endpoint)
        if errors:
            self._batches.fail(job.batch_id, errors)
        else:
            self._batches.begin(job.batch_id, lines)


def parse_body(endpoint: str, content: Any) -> ChatBody | CompletionBody:
    """The body of a line as a best-effort call. Raises APIError."""
    try:
        body = BODIES[endpoint].model_validate(content)
    except ValidationError as error:
        raise from_validation(error.errors()) from None
    if body.stream:
        raise APIError(400, "a line of a batch cannot stream; leave stream out", "stream", "invalid_value")
    return body.model_copy(update={"service_tier": "flex"})


def read_lines(path: Path, endpoint: str) -> tuple[list[Line], list[dict[str, Any]]]:
    """The lines of an input file, and what is wrong with them in the shape of a batch's `errors`."""
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    position = 0
    with path.open("rb") as source:
        for number, text in enumerate(source, start=1):
            start, position = position, position + len(text)
            if not text.strip():
                continue
            content = json.loads(text)  # which it is: the upload was checked
            wrong = _what_is_wrong(content, endpoint, seen)
            if wrong is not None:
                errors.append({"code": wrong[0], "message": wrong[1], "param": wrong[2], "line": number})
                continue
            seen.add(content["custom_id"])
            lines.append(Line(number, content["custom_id"], start, len(text)))
    if not lines and not errors:
        errors.append({"code": "empty_file", "message": "the file has no line", "param": None, "line": None})
    return lines, errors


def _what_is_wrong(content: dict[str, Any], endpoint: str, seen: set[str]) -> tuple[str, str, str] | None:
    """(code, message, field) of the first fault of a line, or None."""
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        return "invalid_custom_id", f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters", "custom_id"
    if custom_id.encode("utf-8", "replace").decode() != custom_id:
        return "invalid_custom_id", "custom_id holds half a surrogate pair", "custom_id"
    if custom_id in seen:
        return "duplicate_custom_id", "this custom_id is that of an earlier line too", "custom_id"
    if content.get("method") != "POST":
        return "invalid_method", 'method must be "POST"', "method"
    if content.get("url") != endpoint:
        return "invalid_url", f"url must be the batch's endpoint, {endpoint}", "url"
    if not isinstance(content.get("body"), dict):
        return "invalid_body", "body must be a JSON object", "body"
    return None
