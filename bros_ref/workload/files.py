"""Workload files: our CSV and JSONL, and public traces exactly as they are published.

    format        columns                                                               time
    own           arrival_s, request_class, prompt_tokens, output_tokens                seconds
                  and optionally ttft_slo_s, tpot_slo_s, prompt
    Azure LLM     TIMESTAMP, ContextTokens, GeneratedTokens                             date and time; the earliest is 0
    Mooncake      timestamp, input_length, output_length (and hash_ids)                 milliseconds
    timed_trace   the same, of vLLM's `bench serve --dataset-name timed_trace`          seconds, unless told otherwise
    BurstGPT      Timestamp, Model, Request tokens, Response tokens, ...                seconds
    plain         arrival_s, input_tokens, output_tokens                                seconds

A file is recognised by its columns; CSV or JSONL by its first character, gzip by its first bytes. Columns that are
not listed are ignored. Invariant: one line is held at a time, and whatever is wrong is one `WorkloadError` that
names the file, the line and the field.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TextIO

from bros_ref.files import write_text
from bros_ref.request import SLO, RequestClass
from bros_ref.workload.generate import WorkloadError, WorkloadItem, merge

Row = dict[str, Any]
MAX_TOKENS = 10**7  # more than any model reads: a length beyond it is a slip, and its prompt would fill the memory
OWN_COLUMNS = ("arrival_s", "request_class", "prompt_tokens", "output_tokens", "ttft_slo_s", "tpot_slo_s", "prompt")
LENGTH_COLUMNS = (("prompt_tokens", "output_tokens"), ("input_tokens", "output_tokens"), ("in", "out"),
                  ("num_prefill_tokens", "num_decode_tokens"), ("ContextTokens", "GeneratedTokens"),
                  ("input_length", "output_length"), ("Request tokens", "Response tokens"))


@dataclass(frozen=True)
class _Format:
    """Where a format keeps its three numbers. `unit_s`: seconds in one unit of time; None for a date and time."""

    name: str
    arrival: str
    prompt_tokens: str
    output_tokens: str
    unit_s: float | None


_OWN = _Format("bros_ref", "arrival_s", "prompt_tokens", "output_tokens", 1.0)
_AZURE = _Format("Azure LLM trace", "TIMESTAMP", "ContextTokens", "GeneratedTokens", None)
_MOONCAKE = _Format("Mooncake", "timestamp", "input_length", "output_length", 1e-3)
_TIMED_TRACE = _Format("timed_trace", "timestamp", "input_length", "output_length", 1.0)
_BURSTGPT = _Format("BurstGPT", "Timestamp", "Request tokens", "Response tokens", 1.0)
_PLAIN = _Format("plain trace", "arrival_s", "input_tokens", "output_tokens", 1.0)
_FORMATS = (_OWN, _AZURE, _MOONCAKE, _BURSTGPT, _PLAIN)  # timed_trace has Mooncake's columns: see `_detect`


def read_workload(path: Path | str, request_class: RequestClass | None = None, slo: SLO | None = None,
                  time_unit_s: float | None = None) -> list[WorkloadItem]:
    """All of a file's items, sorted by arrival (ties in the order of the file). Arguments as for `iter_workload`."""
    return merge(iter_workload(path, request_class, slo, time_unit_s))


def iter_workload(path: Path | str, request_class: RequestClass | None = None, slo: SLO | None = None,
                  time_unit_s: float | None = None) -> Iterator[WorkloadItem]:
    """A file's items one by one, in the order of the file, which need not be the order of arrival.

    Args:
        request_class: the class of rows that name none, so of every public trace.
        slo: the targets of real-time rows that name none.
        time_unit_s: seconds in one unit of `timestamp`, where that is not clear from the file: 1.0 or 0.001.

    Raises:
        WorkloadError: when the bad line is reached; the message names file, line number and field.
    """
    path = Path(path)
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise WorkloadError(f"{path}: no requests in it; expected a header line and one request a line (CSV), or one "
                            "JSON object a line (JSONL)")
    reader = _RowReader(path, _detect(path, *first, time_unit_s), request_class, slo)
    origin_s = _earliest(path, reader) if reader.format.unit_s is None else 0.0
    for line, row in chain([first], rows):
        yield reader.item(line, row, origin_s)


def read_lengths(path: Path | str, max_total_tokens: int) -> tuple[tuple[int, int], ...]:
    """(prompt, output) tokens of each row of a file of lengths or of a trace, those that fit a context of
    `max_total_tokens`: a real dataset in the place of a fitted distribution.

    Raises:
        WorkloadError: no known columns, a bad line, or nothing that fits.
    """
    path, lengths = Path(path), []
    reader: _RowReader | None = None
    for line, row in _rows(path):
        if reader is None:
            columns = next((pair for pair in LENGTH_COLUMNS if row.keys() >= set(pair)), None)
            if columns is None:
                known = "; ".join(", ".join(pair) for pair in LENGTH_COLUMNS)
                raise WorkloadError(f"{path}:{line}: no lengths among {', '.join(row)}; expected one of: {known}")
            reader = _RowReader(path, _Format("lengths", "", *columns, None), None, None)
        pair = (reader.tokens(line, row, reader.format.prompt_tokens),
                reader.tokens(line, row, reader.format.output_tokens))
        if sum(pair) <= max_total_tokens:
            lengths.append(pair)
    if not lengths:
        raise WorkloadError(f"{path}: no lengths in it that fit a context of {max_total_tokens} tokens")
    return tuple(lengths)


def save_workload(items: Iterable[WorkloadItem], path: Path | str) -> None:
    """Writes our CSV (gzipped if the name ends in `.gz`). Reading it gives equal items back."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(OWN_COLUMNS)
    for item in items:
        targets = ("", "") if item.slo is None else (item.slo.ttft_s, item.slo.tpot_s)
        writer.writerow([float(item.arrival_s), item.request_class.value, item.prompt_tokens, item.output_tokens,
                         *targets, "" if item.prompt is None else item.prompt])
    write_text(Path(path), text.getvalue())


# -- from bytes to rows ---------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, columns) of each row, blank lines skipped; reading errors name the file."""
    line = 0
    try:
        with _open(path) as stream:
            first = stream.read(1)
            while first.isspace():
                first = stream.read(1)
            stream.seek(0)
            for line, row in _json_rows(path, stream) if first == "{" else _csv_rows(path, stream):
                yield line, row
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"{path}: cannot be read after line {line}: {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}: after line {line}: {error}; expected CSV or JSONL text in UTF-8") from error


def _open(path: Path) -> TextIO:
    with path.open("rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(stream, start=1):
        if text.isspace():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WorkloadError(f"{path}:{line}: not JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise WorkloadError(f"{path}:{line}: expected a JSON object, got {text.strip()[:40]}")
        yield line, row


def _csv_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(stream)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        if None in row:
            raise WorkloadError(f"{path}:{reader.line_num}: {len(row[None])} cells more than the header has columns; "
                                "expected text with a comma in it to be quoted")
        yield reader.line_num - (row.get("prompt") or "").count("\n"), row  # a quoted prompt may span lines


# -- from rows to items ---------------------------------------------------------------------------------------------


def _detect(path: Path, line: int, row: Row, time_unit_s: float | None) -> _Format:
    """The format that has these columns."""
    missing = {kind: [name for name in (kind.arrival, kind.prompt_tokens, kind.output_tokens) if name not in row]
               for kind in _FORMATS}
    best = min(_FORMATS, key=lambda kind: len(missing[kind]))
    if len(missing[best]) == 3:
        known = "; ".join(f"{kind.arrival}, {kind.prompt_tokens}, {kind.output_tokens} ({kind.name})"
                          for kind in _FORMATS)
        raise WorkloadError(f"{path}:{line}: no known columns among {', '.join(row)}; expected one of: {known}")
    if missing[best]:
        raise WorkloadError(f"{path}:{line}: column {missing[best][0]} is missing; the {best.name} format, whose other "
                            "columns are there, needs it")
    if time_unit_s is None:
        # Mooncake counts whole milliseconds; traces in seconds have fractions (or, from Bailian, a chat_id).
        in_seconds = best is _MOONCAKE and ("chat_id" in row or _has_fraction(row["timestamp"]))
        return _TIMED_TRACE if in_seconds else best
    if best is not _MOONCAKE:
        raise WorkloadError(f"{path}: time_unit_s is for files with a `timestamp` column; the {best.name} format says "
                            "itself what its times are")
    if not (math.isfinite(time_unit_s) and time_unit_s > 0):
        raise WorkloadError(f"{path}: time_unit_s: expected a positive number of seconds, got {time_unit_s!r}")
    return replace(_TIMED_TRACE, unit_s=time_unit_s)


def _has_fraction(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, str) and "." in value)


@dataclass(frozen=True)
class _RowReader:
    """Makes items of the rows of one file."""

    path: Path
    format: _Format
    request_class: RequestClass | None
    slo: SLO | None

    def item(self, line: int, row: Row, origin_s: float) -> WorkloadItem:
        request_class = self._class(line, row)
        return WorkloadItem(self.time_s(line, row) - origin_s, request_class,
                            self.tokens(line, row, self.format.prompt_tokens),
                            self.tokens(line, row, self.format.output_tokens),
                            self._slo(line, row, request_class), self._prompt(line, row))

    def time_s(self, line: int, row: Row) -> float:
        """The row's time in seconds; since the epoch if the format gives a date."""
        column = self.format.arrival
        if self.format.unit_s is None:
            try:
                moment = datetime.datetime.fromisoformat(str(row.get(column)).strip())
            except ValueError:
                self._refuse(line, column, "a date and time such as 2023-11-16 18:15:46.680590", row.get(column))
            return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
        value = self._number(line, row, column)
        if self.format is _MOONCAKE and not value.is_integer():
            self._refuse(line, column, "whole milliseconds, as in the lines before; if these are seconds, say "
                                       "--time-unit-s 1, or pass time_unit_s=1", row[column])
        if value < 0:
            self._refuse(line, column, "a time, at least 0", row[column])
        return value * self.format.unit_s

    def _class(self, line: int, row: Row) -> RequestClass:
        name = row.get("request_class") if self.format is _OWN else None
        if name in (None, ""):
            if self.request_class is None:
                self._refuse(line, "request_class", "rt or be, in the file or for the whole file (--class rt|be)", name)
            return self.request_class
        try:
            return RequestClass(str(name).strip().lower())
        except ValueError:
            self._refuse(line, "request_class", "rt or be", name)

    def tokens(self, line: int, row: Row, column: str) -> int:
        """A length in tokens."""
        value = self._number(line, row, column)
        if not (value.is_integer() and 1 <= value <= MAX_TOKENS):
            hint = " (this trace marks failed requests with 0: drop those lines)" if self.format is _BURSTGPT else ""
            self._refuse(line, column, f"a whole number of tokens from 1 to {MAX_TOKENS}{hint}", row[column])
        return int(value)

    def _slo(self, line: int, row: Row, request_class: RequestClass) -> SLO | None:
        if request_class is RequestClass.REAL_TIME:
            return SLO(self._target(line, row, "ttft_slo_s", self.slo.ttft_s if self.slo else None),
                       self._target(line, row, "tpot_slo_s", self.slo.tpot_s if self.slo else None))
        for column in ("ttft_slo_s", "tpot_slo_s"):
            if self.format is _OWN and row.get(column) not in (None, ""):
                self._refuse(line, column, "nothing: a best-effort request has no target", row[column])
        return None

    def _target(self, line: int, row: Row, column: str, default: float | None) -> float:
        if self.format is not _OWN or row.get(column) in (None, ""):
            if default is None:
                self._refuse(line, column, "seconds, in the file or as a default for the whole file", None)
            return default
        value = self._number(line, row, column)
        if value <= 0:
            self._refuse(line, column, "a positive number of seconds", row[column])
        return value

    def _prompt(self, line: int, row: Row) -> str | None:
        prompt = row.get("prompt") if self.format is _OWN else None
        if not (prompt is None or isinstance(prompt, str)):
            self._refuse(line, "prompt", "text", prompt)
        return prompt or None

    def _number(self, line: int, row: Row, column: str) -> float:
        raw = row.get(column)
        try:
            value = math.nan if isinstance(raw, bool) or raw is None else float(raw)
        except (ValueError, TypeError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            self._refuse(line, column, "a finite number", raw)
        return value

    def _refuse(self, line: int, column: str, expected: str, got: Any) -> NoReturn:
        shown = "nothing" if got is None or got == "" else repr(got)
        raise WorkloadError(f"{self.path}:{line}: {column}: expected {expected}; got {shown}")


def _earliest(path: Path, reader: _RowReader) -> float:
    """The earliest moment of a file of dates: a first pass, so that the second can hold one line at a time."""
    return min(reader.time_s(line, row) for line, row in _rows(path))
