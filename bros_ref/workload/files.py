"""Workload files: our CSV and JSONL, and public traces exactly as they are published.

    format        columns                                                               time
    own           arrival_s, request_class, prompt_tokens, output_tokens                seconds
                  and optionally ttft_slo_s, tpot_slo_s, prompt
    Azure LLM     TIMESTAMP, ContextTokens, GeneratedTokens                             date and time; the earliest is 0
    Mooncake      timestamp, input_length, output_length (and hash_ids)                 milliseconds
    timed_trace   the same, of vLLM's `bench serve --dataset-name timed_trace`          seconds, unless told otherwise
    BurstGPT      Timestamp, Model, Request tokens, Response tokens, ...                seconds
    plain         arrival_s, input_tokens, output_tokens                                seconds

A file is recognised by its columns; columns that are not listed are ignored. A row of a public trace whose prompt or
answer has 0 tokens is a request that failed: it cannot be served again, so it is skipped, counted, and the count is
logged. Invariant: one line is held at a time (all of them only where a pipe would have to be read twice), and whatever
is wrong is one `WorkloadError` that names the file, the line and the field. `rows.py` reads the lines.
"""

from __future__ import annotations

import csv
import datetime
import io
import logging
import math
import reprlib
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from bros_ref.files import write_text
from bros_ref.request import SLO, RequestClass
from bros_ref.workload.generate import MAX_TOKENS, WorkloadError, WorkloadItem, merge
from bros_ref.workload.rows import Row, is_rereadable, read_rows

logger = logging.getLogger(__name__)
OWN_COLUMNS = ("arrival_s", "request_class", "prompt_tokens", "output_tokens", "ttft_slo_s", "tpot_slo_s", "prompt")
LENGTH_COLUMNS = (("prompt_tokens", "output_tokens"), ("input_tokens", "output_tokens"), ("in", "out"),
                  ("num_prefill_tokens", "num_decode_tokens"), ("ContextTokens", "GeneratedTokens"),
                  ("input_length", "output_length"), ("Request tokens", "Response tokens"))


@dataclass(frozen=True)
class _Format:
    """Where a format keeps its three numbers. `unit_s`: seconds in one unit of time; None for a date and time.
    `published`: a recording of a service, in which a request of 0 tokens is one that failed."""

    name: str
    arrival: str
    prompt_tokens: str
    output_tokens: str
    unit_s: float | None
    published: bool = True


_OWN = _Format("bros_ref", "arrival_s", "prompt_tokens", "output_tokens", 1.0, published=False)
_AZURE = _Format("Azure LLM trace", "TIMESTAMP", "ContextTokens", "GeneratedTokens", None)
_MOONCAKE = _Format("Mooncake", "timestamp", "input_length", "output_length", 1e-3)
_TIMED_TRACE = _Format("timed_trace", "timestamp", "input_length", "output_length", 1.0)
_UNDECIDED = _Format("Mooncake or timed_trace", "timestamp", "input_length", "output_length", 1.0)
_BURSTGPT = _Format("BurstGPT", "Timestamp", "Request tokens", "Response tokens", 1.0)
_PLAIN = _Format("plain trace", "arrival_s", "input_tokens", "output_tokens", 1.0, published=False)
_FORMATS = (_OWN, _AZURE, _MOONCAKE, _BURSTGPT, _PLAIN)  # timed_trace has Mooncake's columns: see `_detect`
_DAY_S = 86_400.0


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
    rows = read_rows(path)
    first = next(rows, None)
    if first is None:
        raise WorkloadError(f"{path}: no requests in it; expected a header line and one request a line (CSV), or one "
                            "JSON object a line (JSONL)")
    rows, reader = chain([first], rows), _RowReader(path, _detect(path, *first, time_unit_s), request_class, slo)
    origin_s = 0.0
    if reader.format.unit_s is None or reader.format is _UNDECIDED:  # all rows must be seen before the first is read
        if is_rereadable(path):
            seen: Iterable[tuple[int, Row]] = read_rows(path)
        else:
            seen = held = list(rows)
            rows = iter(held)
        if reader.format is _UNDECIDED:
            reader = replace(reader, format=_unit_of_decimals(reader, seen))
        else:
            origin_s = min(reader.time_s(line, row) for line, row in seen)
    num_rows = num_failed = 0
    for line, row in rows:
        num_rows += 1
        if reader.failed(line, row):
            num_failed += 1
        else:
            yield reader.item(line, row, origin_s)
    _say_failed(path, num_failed, num_rows)


def has_arrivals(path: Path | str) -> bool:
    """Whether a file has a column of arrival times, so that `read_workload` can read it.

    Raises:
        WorkloadError: it cannot be read.
    """
    first = next(read_rows(Path(path)), None)
    return first is not None and any(kind.arrival in first[1] for kind in _FORMATS)


def read_lengths(path: Path | str, max_total_tokens: int) -> tuple[tuple[int, int], ...]:
    """(prompt, output) tokens of each row of a file of lengths or of a trace, those that fit a context of
    `max_total_tokens`: a real dataset in the place of a fitted distribution.

    Raises:
        WorkloadError: no known columns, a bad line, or nothing that fits.
    """
    path, lengths = Path(path), []
    reader: _RowReader | None = None
    num_rows = num_failed = 0
    for line, row in read_rows(path):
        if reader is None:
            columns = next((pair for pair in LENGTH_COLUMNS if row.keys() >= set(pair)), None)
            if columns is None:
                known = "; ".join(", ".join(pair) for pair in LENGTH_COLUMNS)
                raise WorkloadError(f"{path}:{line}: no lengths among {_shown(row)}; expected one of: {known}")
            published = any(kind.published and kind.prompt_tokens == columns[0] for kind in _FORMATS)
            reader = _RowReader(path, _Format("lengths", "", *columns, None, published), None, None)
        num_rows += 1
        if reader.failed(line, row):
            num_failed += 1
            continue
        pair = (reader.tokens(line, row, reader.format.prompt_tokens),
                reader.tokens(line, row, reader.format.output_tokens))
        if sum(pair) <= max_total_tokens:
            lengths.append(pair)
    _say_failed(path, num_failed, num_rows)
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


# -- from rows to items ---------------------------------------------------------------------------------------------


def _detect(path: Path, line: int, row: Row, time_unit_s: float | None) -> _Format:
    """The format that has these columns."""
    missing = {kind: [name for name in (kind.arrival, kind.prompt_tokens, kind.output_tokens) if name not in row]
               for kind in _FORMATS}
    best = min(_FORMATS, key=lambda kind: len(missing[kind]))
    if len(missing[best]) == 3:
        known = "; ".join(f"{kind.arrival}, {kind.prompt_tokens}, {kind.output_tokens} ({kind.name})"
                          for kind in _FORMATS)
        raise WorkloadError(f"{path}:{line}: no known columns among {_shown(row)}; expected one of: {known}")
    if missing[best]:
        raise WorkloadError(f"{path}:{line}: column {missing[best][0]} is missing; the {best.name} format, whose other "
                            "columns are there, needs it")
    if time_unit_s is None:
        # Mooncake publishes whole milliseconds, Bailian (whose rows have a chat_id) seconds; decimals may be either.
        if best is _MOONCAKE and "chat_id" in row:
            return _TIMED_TRACE
        return _UNDECIDED if best is _MOONCAKE and _is_decimal(row["timestamp"]) else best
    if best is not _MOONCAKE:
        raise WorkloadError(f"{path}: time_unit_s is for files with a `timestamp` column; the {best.name} format says "
                            "itself what its times are")
    if not (math.isfinite(time_unit_s) and time_unit_s > 0):
        raise WorkloadError(f"{path}: time_unit_s: expected a positive number of seconds, got {time_unit_s!r}")
    return replace(_TIMED_TRACE, unit_s=time_unit_s)


def _is_decimal(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, str) and not value.strip().isdecimal())


def _unit_of_decimals(reader: _RowReader, rows: Iterable[tuple[int, Row]]) -> _Format:
    """Seconds or milliseconds, for a file whose times are written as decimals: seconds if some have fractions and, as
    seconds, all are below one day; milliseconds if none has a fraction and, as seconds, they would exceed one day.
    Otherwise an error asks for the unit."""
    latest, num_fractions = 0.0, 0
    for line, row in rows:
        value = reader.time_s(line, row)
        latest = max(latest, value)
        num_fractions += not value.is_integer()
    if latest == 0 or (num_fractions and latest < _DAY_S):
        return _TIMED_TRACE
    if not num_fractions and latest >= _DAY_S:
        return _MOONCAKE
    what = f"{num_fractions} of its times have fractions" if num_fractions else "its times are whole numbers"
    raise WorkloadError(f"{reader.path}: timestamp: seconds or milliseconds? {what}, up to {latest:g}, so it could be "
                        "either; say --time-unit-s 1 or --time-unit-s 0.001, or pass time_unit_s")


def _say_failed(path: Path, num_failed: int, num_rows: int) -> None:
    if not num_failed:
        return
    said = f"{path}: skipped {num_failed:,} of {num_rows:,} rows: failed requests, with 0 tokens of prompt or answer"
    if num_failed == num_rows:
        raise WorkloadError(f"{said}; nothing is left to serve")
    logger.warning(said)


def _shown(row: Row) -> str:
    return textwrap.shorten(", ".join(row), 200, placeholder=" ...")


@dataclass(frozen=True)
class _RowReader:
    """Makes items from the rows of one file."""

    path: Path
    format: _Format
    request_class: RequestClass | None
    slo: SLO | None

    def item(self, line: int, row: Row, origin_s: float) -> WorkloadItem:
        """The row's item; `origin_s` is the time that counts as 0."""
        request_class = self._class(line, row)
        arrival_s = self.time_s(line, row) - origin_s
        prompt_tokens = self.tokens(line, row, self.format.prompt_tokens)
        output_tokens = self.tokens(line, row, self.format.output_tokens)
        slo, prompt = self._slo(line, row, request_class), self._prompt(line, row)
        try:
            return WorkloadItem(arrival_s, request_class, prompt_tokens, output_tokens, slo, prompt)
        except WorkloadError as error:
            raise WorkloadError(f"{self.path}:{line}: {error}") from error

    def failed(self, line: int, row: Row) -> bool:
        """Whether this is a request that failed when the trace was recorded."""
        if not self.format.published:
            return False
        lengths = [self._number(line, row, column) for column in (self.format.prompt_tokens, self.format.output_tokens)]
        return min(lengths) == 0 and all(length.is_integer() for length in lengths)

    def time_s(self, line: int, row: Row) -> float:
        """The row's time in seconds; since the epoch if the format gives a date."""
        column = self.format.arrival
        if self.format.unit_s is None:
            try:
                moment = datetime.datetime.fromisoformat(str(row.get(column)).strip())
                return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
            except (ValueError, OverflowError):
                self._refuse(line, column, "a date and time such as 2023-11-16 18:15:46.680590", row.get(column))
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
            self._refuse(line, column, f"a whole number of tokens from 1 to {MAX_TOKENS}", row[column])
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
            odd = isinstance(raw, bool) or "_" in str(raw)  # both of which float would take
            value = math.nan if raw is None or odd else float(raw)
        except (ValueError, TypeError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            self._refuse(line, column, "a finite number", raw)
        return value

    def _refuse(self, line: int, column: str, expected: str, got: Any) -> NoReturn:
        shown = "nothing" if got is None or got == "" else reprlib.repr(got)
        raise WorkloadError(f"{self.path}:{line}: {column}: expected {expected}; got {shown}")
