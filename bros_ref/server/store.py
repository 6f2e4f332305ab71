"""Where files and batches live: one SQLite database (write-ahead log) and a folder of files.

    data_dir/store.sqlite     rows of files, batches and lines of batches
    data_dir/files/ID         contents, named by random ids that must have a row; no user input becomes a path
    data_dir/lock             held while a server uses the folder

A file's contents are complete and on disk before its row exists, so what a crash leaves behind is a content without a
row, and those are removed at the next start. Every change of state is one transaction. Times are wall-clock seconds
and are only shown and compared with an expiry; order is the order of insertion, so a clock that is set back does no
harm. One connection, one lock; callers that must not wait call through a thread.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL, output_file_id TEXT, error_file_id TEXT, status TEXT NOT NULL,
    times TEXT NOT NULL, expires_at INTEGER NOT NULL, errors TEXT, metadata TEXT, counts TEXT);
CREATE TABLE IF NOT EXISTS lines (
    batch_id TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, start INTEGER NOT NULL,
    bytes INTEGER NOT NULL, state TEXT NOT NULL, output TEXT,
    PRIMARY KEY (batch_id, number), UNIQUE (batch_id, custom_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS lines_by_state ON lines (batch_id, state, number);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status);
"""
COPY_BYTES = 1 << 20


class StoreError(ValueError):
    """The data folder cannot be used; the message says why."""


class Store:
    """The database and the folder.

    Raises:
        StoreError: another server uses the folder, or its database cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._guard = (folder / "lock").open("w")
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._guard.close()
            raise StoreError(f"{folder} is in use by another server; give this one a --data-dir of its own") from None
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(folder / "store.sqlite", check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            self.close()
            raise StoreError(f"{folder / 'store.sqlite'} cannot be used: {error}; move it away to start afresh"
                             ) from error
        self._remove_leftovers()

    def close(self) -> None:
        """Closes the database and lets another server use the folder."""
        self._connection.close()
        self._guard.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing: commits at the end, rolls back if anything is raised."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.OperationalError):  # SQLite has rolled back by itself, as it does when it is full
                    self._connection.execute("ROLLBACK")
                raise

    def query(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a SELECT."""
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    # -- contents of files ------------------------------------------------------------------------------------

    @contextmanager
    def new_content(self) -> Iterator[tuple[str, IO[bytes]]]:
        """A new id and a file to write its content into. The content is on disk when the block ends; if the block
        raises, there is none."""
        file_id = f"file-{secrets.token_hex(16)}"
        partial = self._files / f"{file_id}.part"
        try:
            with partial.open("wb") as out:
                yield file_id, out
                out.flush()
                os.fsync(out.fileno())
            partial.rename(self._files / file_id)
            self._sync_folder()
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def content_path(self, file_id: str) -> Path:
        """The path of the content of a file that has a row."""
        return self._files / file_id

    def remove_content(self, file_id: str) -> None:
        """Deletes the content of a file whose row is gone."""
        (self._files / file_id).unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        handle = os.open(self._files, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _remove_leftovers(self) -> None:
        known = {row["id"] for row in self.query("SELECT id FROM files")}
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink()
