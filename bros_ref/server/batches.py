"""Batches and their lines as rows: every state that a batch can be in, and the transactions between them.

    validating -> failed
    validating -> in_progress -> finalizing -> completed
                      |  \\-> expired (its window has passed)
                      \\-> cancelling -> cancelled

Invariants: a line leaves the state `waiting` once, in the transaction that stores its output; the output files are
written from the rows and appear in the transaction that ends the batch. So after a crash at any moment the rows say
exactly what is left to do, and each `custom_id` ends up once in the output file or in the error file.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bros_ref.server.errors import APIError, not_found
from bros_ref.server.files import as_list, insert_file, page_of
from bros_ref.server.store import Store

WINDOW_S = 24 * 3600
ENDED = ("failed", "completed", "expired", "cancelled")
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an input file: where it begins in the file and how long it is, in bytes; numbers count from 1."""

    number: int
    custom_id: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Job:
    """What the runner needs to know about a batch."""

    batch_id: str
    endpoint: str
    input_file_id: str
    status: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class LineResult:
    """The outcome of a line: the answer's status and body, or the error object of a line that was never run."""

    batch_id: str
    number: int
    status: int | None
    body: dict[str, Any]

    @property
    def state(self) -> str:
        return "completed" if self.status == 200 else "failed"


class Batches:
    """All batches of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # -- for the routes ---------------------------------------------------------------------------------------

    def create(self, owner: str, endpoint: str, input_file_id: str, metadata: dict[str, str] | None) -> dict[str, Any]:
        """Makes a batch, to be validated. Raises APIError: the key has no such file for batches."""
        now, batch_id = int(time.time()), f"batch_{secrets.token_hex(16)}"
        with self._store.transaction() as database:
            file = database.execute("SELECT purpose FROM files WHERE id = ? AND owner = ?",
                                    (input_file_id, owner)).fetchone()
            if file is None or file["purpose"] != "batch":
                raise APIError(400, f"there is no file {input_file_id[:80]!r} with purpose batch", "input_file_id",
                               "not_found")
            database.execute(
                "INSERT INTO batches (id, owner, endpoint, input_file_id, status, times, expires_at, metadata) "
                "VALUES (?, ?, ?, ?, 'validating', ?, ?, ?)",
                (batch_id, owner, endpoint, input_file_id, json.dumps({"created": now}), now + WINDOW_S,
                 None if metadata is None else json.dumps(metadata)))
        return self.get(owner, batch_id)

    def get(self, owner: str, batch_id: str) -> dict[str, Any]:
        """The batch object. Raises APIError: there is none, or it is another key's."""
        rows = self._store.query("SELECT * FROM batches WHERE id = ? AND owner = ?", batch_id, owner)
        if not rows:
            raise not_found("batch", batch_id)
        return self._as_object(rows[0])

    def page(self, owner: str, after: str | None, limit: int) -> dict[str, Any]:
        """A list of batch objects, the newest first."""
        rows = page_of(self._store, "batches", owner, after, limit, "desc")
        return as_list([self._as_object(row) for row in rows], limit)

    def cancel(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Asks for the end of a batch; one that is ending or has ended is refused with 400."""
        self.get(owner, batch_id)
        if not self._move(batch_id, ("validating", "in_progress"), "cancelling"):
            raise APIError(400, "this batch is ending or has ended; it cannot be cancelled", "id", "batch_ended")
        return self.get(owner, batch_id)

    # -- for the runner ---------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """The batches that have not ended, oldest first."""
        marks = ", ".join("?" * len(ENDED))
        rows = self._store.query(f"SELECT * FROM batches WHERE status NOT IN ({marks}) ORDER BY number", *ENDED)
        return [Job(row["id"], row["endpoint"], row["input_file_id"], row["status"], row["expires_at"])
                for row in rows]

    def begin(self, batch_id: str, lines: Iterable[Line]) -> None:
        """A valid batch: its lines, all waiting, and its new status in one transaction."""
        with self._store.transaction() as database:
            if not _move(database, batch_id, ("validating",), "in_progress"):
                return  # cancelled meanwhile
            database.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?, 'waiting', NULL)",
                                 ((batch_id, line.number, line.custom_id, line.start, line.length) for line in lines))

    def fail(self, batch_id: str, errors: Sequence[dict[str, Any]]) -> None:
        """An input file that cannot be run; `errors` name lines and reasons."""
        with self._store.transaction() as database:
            if _move(database, batch_id, ("validating",), "failed"):
                database.execute("UPDATE batches SET errors = ? WHERE id = ?",
                                 (json.dumps(list(errors)[:MAX_ERRORS]), batch_id))

    def waiting(self, batch_id: str, after: int, limit: int) -> list[Line]:
        """Up to `limit` lines that have not run, those behind line `after`."""
        rows = self._store.query("SELECT * FROM lines WHERE batch_id = ? AND state = 'waiting' AND number > ? "
                                 "ORDER BY number LIMIT ?", batch_id, after, limit)
        return [Line(row["number"], row["custom_id"], row["start"], row["bytes"]) for row in rows]

    def read(self, job: Job, line: Line) -> Any:
        """The body of a line, out of the input file."""
        with self._store.content_path(job.input_file_id).open("rb") as source:
            source.seek(line.start)
            return json.loads(source.read(line.length))["body"]

    def finish(self, results: Sequence[LineResult]) -> None:
        """Stores outputs and marks their lines as no longer waiting, all in one transaction."""
        with self._store.transaction() as database:
            for result in results:
                database.execute("UPDATE lines SET state = ?, output = ? WHERE batch_id = ? AND number = ? "
                                 "AND state = 'waiting'",
                                 (result.state, _response(result), result.batch_id, result.number))

    def close_lines(self, batch_id: str, state: str, message: str) -> None:
        """Ends the lines that are still waiting: `state` is expired or cancelled."""
        error = json.dumps({"response": None, "error": {"code": f"batch_{state}", "message": message}})
        with self._store.transaction() as database:
            database.execute("UPDATE lines SET state = ?, output = ? WHERE batch_id = ? AND state = 'waiting'",
                             (state, error, batch_id))

    def start_ending(self, batch_id: str) -> None:
        """Moves on to writing the output files: no line is waiting any more."""
        self._move(batch_id, ("in_progress",), "finalizing")

    def end(self, batch_id: str, status: str) -> None:
        """Writes output and error file, and ends the batch in the transaction that makes them visible."""
        written, kinds = {}, {"output_file_id": "= 'completed'", "error_file_id": "NOT IN ('waiting', 'completed')"}
        for column, states in kinds.items():
            rows = self._store.query(f"SELECT custom_id, output FROM lines WHERE batch_id = ? AND state {states} "
                                     "ORDER BY number", batch_id)
            if not rows:
                continue
            with self._store.new_content() as (file_id, out):
                size = sum(out.write(_output_line(row)) for row in rows)
            written[column] = (file_id, size)
        with self._store.transaction() as database:
            if not _move(database, batch_id, ("in_progress", "finalizing", "cancelling"), status):
                return
            owner = database.execute("SELECT owner FROM batches WHERE id = ?", (batch_id,)).fetchone()["owner"]
            for column, (file_id, size) in written.items():
                name = f"{batch_id}_{column.removesuffix('_file_id')}.jsonl"
                insert_file(database, file_id, owner, name, "batch_output", size)
                database.execute(f"UPDATE batches SET {column} = ? WHERE id = ?", (file_id, batch_id))
            counts = self._count(batch_id)  # which the rows of the lines, now of no more use, no longer say
            database.execute("UPDATE batches SET counts = ? WHERE id = ?", (json.dumps(counts), batch_id))
            database.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))

    def counts(self) -> dict[str, int]:
        """Lines of the batches that have not ended, by state."""
        rows = self._store.query("SELECT state, COUNT(*) AS count FROM lines GROUP BY state")
        return {row["state"]: row["count"] for row in rows}

    def _count(self, batch_id: str) -> dict[str, int]:
        rows = self._store.query("SELECT state, COUNT(*) AS count FROM lines WHERE batch_id = ? GROUP BY state",
                                 batch_id)
        found = {row["state"]: row["count"] for row in rows}
        total, waiting, completed = sum(found.values()), found.get("waiting", 0), found.get("completed", 0)
        return {"total": total, "completed": completed, "failed": total - waiting - completed}

    def _move(self, batch_id: str, sources: Sequence[str], target: str) -> bool:
        with self._store.transaction() as database:
            return _move(database, batch_id, sources, target)

    def _as_object(self, row: sqlite3.Row) -> dict[str, Any]:
        counts = json.loads(row["counts"]) if row["counts"] else self._count(row["id"])
        times = json.loads(row["times"])
        errors = None if row["errors"] is None else {"object": "list", "data": json.loads(row["errors"])}
        return {"id": row["id"], "object": "batch", "endpoint": row["endpoint"], "errors": errors,
                "input_file_id": row["input_file_id"], "completion_window": "24h", "status": row["status"],
                "output_file_id": row["output_file_id"], "error_file_id": row["error_file_id"],
                "created_at": times["created"], "expires_at": row["expires_at"],
                **{f"{name}_at": times.get(name) for name in TIMES},
                "request_counts": counts,
                "metadata": None if row["metadata"] is None else json.loads(row["metadata"])}


def _move(database: sqlite3.Connection, batch_id: str, sources: Sequence[str], target: str) -> bool:
    """Changes the status if it is one of `sources`; says whether it was."""
    row = database.execute("SELECT status, times FROM batches WHERE id = ?", (batch_id,)).fetchone()
    if row["status"] not in sources:
        return False
    times = json.loads(row["times"]) | {target: int(time.time())}
    database.execute("UPDATE batches SET status = ?, times = ? WHERE id = ?", (target, json.dumps(times), batch_id))
    return True


def _response(result: LineResult) -> str:
    if result.status is None:
        return json.dumps({"response": None, "error": result.body})
    return json.dumps({"response": {"status_code": result.status, "request_id": f"req_{secrets.token_hex(12)}",
                                    "body": result.body}, "error": None})


def _output_line(row: sqlite3.Row) -> bytes:
    content = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": row["custom_id"], **json.loads(row["output"])}
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
