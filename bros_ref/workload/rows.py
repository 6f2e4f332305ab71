"""From bytes to rows: CSV or JSONL, gzipped or not, from a file, a pipe (`<(...)`, a FIFO) or standard input (`-`).

It knows no format's columns. Invariants: one line is held at a time, and no line is longer than MAX_LINE, so memory
stays bounded whatever the file is; reading a pipe without a writer times out; whatever is wrong is one `WorkloadError`
that names the file and the line.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import select
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from bros_ref.workload.generate import MAX_PROMPT_CHARACTERS, WorkloadError

Row = dict[str, Any]
STDIN = "-"
MAX_LINE = 2**26  # characters: a prompt of the greatest length, with room for its quotes and escapes
WRITER_TIMEOUT_S = 10.0


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number of its first line, columns) of each row; blank lines are skipped.

    Raises:
        WorkloadError: it cannot be read, is no text, or has a malformed row.
    """
    line = 0
    try:
        with _lines(path) as lines:
            num_blank = 0
            for first in lines:
                if not first.isspace():
                    break
                num_blank += 1
            else:
                return
            parse = _json_rows if first.lstrip()[0] in "{[" else _csv_rows
            for line, row in parse(path, chain([first], lines), num_blank):
                yield line, row
    except (OSError, EOFError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise WorkloadError(f"{path}: cannot be read after line {line}: {why}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}: after line {line}: {error}; expected CSV or JSONL text in UTF-8") from error


def is_rereadable(path: Path) -> bool:
    """Whether reading it again gives the same rows: a file, not a pipe."""
    return str(path) != STDIN and path.is_file()


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of the text, each with its end, no longer than MAX_LINE."""
    with _open(path) as raw:
        stream = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        if stream.peek(1)[:1] == b"\0":
            raise WorkloadError(f"{path}: starts with a zero byte, so it is no text; expected CSV or JSONL")
        yield _bounded(path, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))


def _bounded(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and line[-1] not in "\r\n":
            raise WorkloadError(f"{path}:{number}: longer than {MAX_LINE:,} characters; expected one request a line")
        yield line


def _open(path: Path) -> io.BufferedReader:
    if str(path) == STDIN:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # otherwise a FIFO without a writer blocks for ever
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISFIFO(mode) and os.path.exists(os.path.realpath(path)):  # `<(...)` has no name but has its writer
            _await_writer(path, descriptor)
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _await_writer(path: Path, descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    if not poll.poll(1e3 * WRITER_TIMEOUT_S):
        raise WorkloadError(f"{path}: a pipe into which nothing was written for {WRITER_TIMEOUT_S:g} s; start what "
                            "writes the workload first, or pass a file")


def _json_rows(path: Path, lines: Iterator[str], num_before: int) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(lines, start=num_before + 1):
        if text.isspace():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise WorkloadError(f"{path}:{line}: not JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise WorkloadError(f"{path}:{line}: expected a JSON object, got {text.strip()[:40]}")
        yield line, row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"{_twice([key for key, _ in pairs])!r} is there twice")
    return row


def _csv_rows(path: Path, lines: Iterator[str], num_before: int) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_PROMPT_CHARACTERS))  # of the whole process; 131,072 at first
    reader = csv.reader(lines, strict=True)
    header = [name.strip() for name in next(reader)]
    if (name := _twice([name for name in header if name])) is not None:
        raise WorkloadError(f"{path}:{num_before + 1}: column {name} is there twice; expected each name once")
    while True:
        line = num_before + reader.line_num + 1  # a quoted prompt may span lines: this is its first
        cells = next(reader, None)
        if cells is None:
            return
        if len(cells) > len(header):
            raise WorkloadError(f"{path}:{line}: {len(cells) - len(header)} cells more than the header has columns; "
                                "expected text with a comma in it to be quoted")
        if "".join(cells).strip():
            yield line, dict(zip_longest(header, cells))  # None where a short row has no cell


def _twice(names: list[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for place, name in enumerate(names) if name in names[:place]), None)
