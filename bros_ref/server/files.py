"""`/v1/files`: input files of batches come in, output files go out. A key sees its own files only."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from bros_ref.server.errors import APIError, not_found
from bros_ref.server.settings import MAX_BATCH_LINES, MAX_BODY_BYTES, MAX_UPLOAD_BYTES
from bros_ref.server.store import Store

LIVE = ("validating", "in_progress", "finalizing", "cancelling")  # batches that still read their input
MAX_PAGE = 10_000


class Files:
    """Rows of files, each with its content."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, owner: str, filename: str, source: IO[bytes]) -> dict[str, Any]:
        """Copies an upload into the store, checking each line.

        Raises:
            APIError: it is too large, has too many lines, or a line is no JSON object.
        """
        with self._store.new_content() as (file_id, out):
            size = 0
            for line in checked_lines(source):
                size += len(line)
                if size > MAX_UPLOAD_BYTES:
                    raise APIError(413, f"the file is larger than {MAX_UPLOAD_BYTES} bytes; split it", "file")
                out.write(line)
        with self._store.transaction() as database:
            insert_file(database, file_id, owner, filename, "batch", size)
        return self.get(owner, file_id)

    def get(self, owner: str, file_id: str) -> dict[str, Any]:
        """The file object. Raises APIError: there is none, or it is another key's."""
        rows = self._store.query("SELECT * FROM files WHERE id = ? AND owner = ?", file_id, owner)
        if not rows:
            raise not_found("file", file_id)
        return as_object(rows[0])

    def page(self, owner: str, purpose: str | None, after: str | None, limit: int, order: str) -> dict[str, Any]:
        """A list of file objects, the newest first unless `order` is "asc"."""
        rows = page_of(self._store, "files", owner, after, limit, order, purpose)
        return as_list([as_object(row) for row in rows], limit)

    def path(self, owner: str, file_id: str) -> Path:
        """Where the content is. Raises APIError."""
        self.get(owner, file_id)
        return self._store.content_path(file_id)

    def delete(self, owner: str, file_id: str) -> dict[str, Any]:
        """Removes a file. Raises APIError: there is none, or a batch still reads it."""
        with self._store.transaction() as database:
            self.get(owner, file_id)
            marks = ", ".join("?" * len(LIVE))
            if database.execute(f"SELECT 1 FROM batches WHERE input_file_id = ? AND status IN ({marks})",
                                (file_id, *LIVE)).fetchone():
                raise APIError(400, "a batch that has not ended reads this file; cancel the batch first", "id",
                               "file_in_use")
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._store.remove_content(file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def insert_file(database: sqlite3.Connection, file_id: str, owner: str, filename: str, purpose: str, size: int) -> None:
    """Makes the row of a content that is on disk."""
    database.execute("INSERT INTO files (id, owner, filename, purpose, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
                     (file_id, owner, filename, purpose, size, int(time.time())))


def checked_lines(source: IO[bytes]) -> Iterator[bytes]:
    """The lines of an upload as they are.

    Raises:
        APIError: naming the first line that is no JSON object, or what is too much.
    """
    number = 0
    while line := source.readline(MAX_BODY_BYTES + 1):
        number += 1
        where = f"line {number}"
        if len(line) > MAX_BODY_BYTES:
            raise APIError(400, f"{where} is longer than {MAX_BODY_BYTES} bytes", "file", "invalid_file")
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is no UTF-8, or nested too deep"
                raise APIError(400, f"{where} is not valid JSON: {reason}", "file", "invalid_file") from None
            if not isinstance(content, dict):
                raise APIError(400, f"{where} is not a JSON object", "file", "invalid_file")
        if number > MAX_BATCH_LINES:
            raise APIError(400, f"the file has more than {MAX_BATCH_LINES} lines; split it", "file", "invalid_file")
        yield line
    if number == 0:
        raise APIError(400, "the file is empty", "file", "invalid_file")


def page_of(store: Store, table: str, owner: str, after: str | None, limit: int, order: str,
            purpose: str | None = None) -> list[sqlite3.Row]:
    """One row more than `limit`, if there is one. Raises APIError: there is no `after`."""
    newest_first = order == "desc"
    start = (1 << 62) if newest_first else 0
    if after is not None:
        rows = store.query(f"SELECT number FROM {table} WHERE id = ? AND owner = ?", after, owner)
        if not rows:
            raise APIError(400, "after: there is nothing with this id", "after", "invalid_value")
        start = rows[0]["number"]
    purposes = "AND purpose = ?" if purpose is not None else ""
    sql = (f"SELECT * FROM {table} WHERE owner = ? AND number {'<' if newest_first else '>'} ? {purposes} "
           f"ORDER BY number {'DESC' if newest_first else 'ASC'} LIMIT ?")
    return store.query(sql, owner, start, *([purpose] if purpose is not None else []), limit + 1)


def as_list(objects: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list object of at most `limit` of the objects."""
    shown = objects[:limit]
    return {"object": "list", "data": shown, "has_more": len(objects) > limit,
            "first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}


def as_object(row: sqlite3.Row) -> dict[str, Any]:
    """OpenAI's file object."""
    return {"id": row["id"], "object": "file", "bytes": row["bytes"], "created_at": row["created_at"],
            "filename": row["filename"], "purpose": row["purpose"], "status": "processed", "expires_at": None}


def file_routes(files: Files) -> APIRouter:
    """The routes; work on disk is done in threads."""
    router = APIRouter(prefix="/v1/files", tags=["files"])

    @router.post("")
    async def upload(http: Request, file: UploadFile, purpose: Annotated[Literal["batch"], Form()]) -> dict[str, Any]:
        """Takes the input file of a batch: JSON Lines, at most 200 MB and 50,000 lines."""
        name = (file.filename or "batch.jsonl")[:255]
        return await asyncio.to_thread(files.add, http.state.owner, name, file.file)

    @router.get("")
    async def listing(http: Request, purpose: Annotated[str | None, Query(max_length=64)] = None,
                      after: Annotated[str | None, Query(max_length=128)] = None,
                      limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
                      order: Literal["asc", "desc"] = "desc") -> dict[str, Any]:
        """The key's files."""
        return await asyncio.to_thread(files.page, http.state.owner, purpose, after, limit, order)

    @router.get("/{file_id}")
    async def one(http: Request, file_id: str) -> dict[str, Any]:
        """One file object."""
        return await asyncio.to_thread(files.get, http.state.owner, file_id)

    @router.get("/{file_id}/content", response_class=FileResponse)
    async def content(http: Request, file_id: str) -> FileResponse:
        """The file itself."""
        path = await asyncio.to_thread(files.path, http.state.owner, file_id)
        return FileResponse(path, media_type="application/octet-stream")

    @router.delete("/{file_id}")
    async def delete(http: Request, file_id: str) -> dict[str, Any]:
        """Deletes a file that no running batch reads."""
        return await asyncio.to_thread(files.delete, http.state.owner, file_id)

    return router
