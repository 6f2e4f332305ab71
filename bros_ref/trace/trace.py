"""What happened, step by step, and why: the one record that metrics, reports, widgets and tests read.

A `Trace` is plain data (strings, numbers, lists): it saves to JSON, replays without an engine, and two runs compare
with `==`. It knows no scheduler and no cache; the engine fills it. Invariant: everything a figure shows can be
derived from the trace alone, including the owner of every slot at every step (`pool_at`). Here are the records and
their file; `replay.py` derives, `perfetto.py` exports.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from bros_ref.files import write_text
from bros_ref.kv_cache.blocks import BlockView
from bros_ref.scheduler.output import BEHIND
from bros_ref.trace.perfetto import trace_events
from bros_ref.trace.records import PhaseSpan, RequestRecord, SlotCopies, StepRecord
from bros_ref.trace.replay import replay_changes, replay_copies, replay_phases, replay_pools

KIND = "bros_ref.trace"  # tells a trace from any other JSON file
SCHEMA = 2
RENAMED = {"lost": "offloaded", "bound_s": "step_budget_s"}  # what schema 1 called the fields of a step

Record = TypeVar("Record")


@dataclass
class Trace:
    """A run: header, requests, steps. `slot_bytes` is the size of one token's K and V over all layers.

    Every number is finite, because JSON has no NaN and no infinity; an unlimited budget is None.
    """

    policy: str
    model: str
    device: str
    num_blocks: int
    block_size: int
    slot_bytes: int
    seed: int
    environment: dict[str, Any] = field(default_factory=dict)
    requests: dict[str, RequestRecord] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)  # request id -> why add_request refused it
    steps: list[StepRecord] = field(default_factory=list)
    # ends outside a step (an abort between two of them): request id -> [time, "aborted"]
    ended_outside: dict[str, list[Any]] = field(default_factory=dict)

    def append(self, step: StepRecord) -> None:
        """Adds one step."""
        self.steps.append(step)

    # -- the file -------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Writes the trace as JSON, gzipped if the name ends in `.gz`. The same trace gives the same bytes.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        path = Path(path)
        content = {"kind": KIND, "schema": SCHEMA, **_plain(self),
                   "requests": {request_id: _plain(record) for request_id, record in self.requests.items()},
                   "steps": [_plain(step) for step in self.steps]}
        try:
            text = json.dumps(content, allow_nan=False, separators=(",", ":"))
        except ValueError as error:
            raise ValueError(f"{path}: this trace cannot be saved, a number in it is NaN or infinite; "
                             "use None for what does not exist") from error
        write_text(path, text)

    @classmethod
    def load(cls, path: Path | str) -> Trace:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a trace, is cut short, or has another schema; the message names the file.
        """
        path = Path(path)
        if path.exists() and not path.is_file():  # a device may never end, a pipe may never begin
            raise ValueError(f"{path}: not a file; expected JSON written by Trace.save")
        try:
            data = path.read_bytes()
            content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data, parse_constant=_no_number)
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a trace, or cut short: {error}; expected JSON written by Trace.save "
                             "(gzipped if and only if the name ends in .gz)") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f'{path}: not a trace: expected a JSON object with "kind": "{KIND}"')
        if content.get("schema") == 1:
            _rename_fields(content)
        elif content.get("schema") != SCHEMA:
            raise ValueError(f"{path}: trace schema {content.get('schema')!r}, but this version reads schemas 1 "
                             f"to {SCHEMA}; record the run again, or use the version that wrote it")
        header = {key: value for key, value in content.items() if key not in ("kind", "schema")}
        trace = _record(cls, header, f"{path}: header")
        if not (isinstance(trace.requests, dict) and isinstance(trace.steps, list)):
            raise ValueError(f"{path}: expected `requests` to be an object and `steps` a list")
        trace.requests = {request_id: _record(RequestRecord, values, f"{path}: request {request_id!r}")
                          for request_id, values in trace.requests.items()}
        trace.steps = [_record(StepRecord, values, f"{path}: step {index}")
                       for index, values in enumerate(trace.steps)]
        return trace

    def to_perfetto(self, path: Path | str) -> None:
        """Writes trace-event JSON for a trace viewer (ui.perfetto.dev, chrome://tracing); `.gz` compresses it."""
        events = trace_events(self)
        write_text(Path(path), json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":")))

    # -- what can be derived --------------------------------------------------------------------------------------

    @property
    def start_s(self) -> float:
        """The first arrival, or the first step where nothing arrived; 0.0 for an empty trace."""
        arrivals = [record.arrival_s for record in self.requests.values()]
        return min(arrivals or [step.start_s for step in self.steps[:1]] or [0.0])

    @property
    def end_s(self) -> float:
        """The last event: the end of the last step, a later end outside a step, or a later arrival."""
        ends = [step.end_s for step in self.steps[-1:]] + [float(time_s) for time_s, _ in self.ended_outside.values()]
        return max([*ends, *(record.arrival_s for record in self.requests.values())], default=self.start_s)

    def pools(self) -> Iterator[list[BlockView]]:
        """The KV pool after the decision of each step, from the first on: lists of [num_blocks].

        Tokens that the step is about to write count as there. Only blocks that changed get a new view, so two
        consecutive lists share the others: read them, do not write to them.
        """
        return replay_pools(self)

    def pool_changes(self) -> Iterator[dict[int, BlockView]]:
        """What changes from each of `pools` to the next, from an empty pool on: block id -> its new view, ascending.
        O(changes), where looking at every block of every step would take seconds."""
        return replay_changes(self)

    def copies(self) -> Iterator[list[SlotCopies]]:
        """The slots that each step saved to the host, brought back or moved, from the first step on."""
        return replay_copies(self)

    def pool_at(self, step_index: int) -> list[BlockView]:
        """The KV pool after the decision of `steps[step_index]`, [num_blocks]. O(all steps before it).

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step_index < len(self.steps):
            raise IndexError(f"step index {step_index}: this trace has steps 0 to {len(self.steps) - 1}")
        return next(islice(self.pools(), step_index, None))

    def phases(self) -> dict[str, list[PhaseSpan]]:
        """What each request was doing, when: request id -> spans without gaps, from its arrival to its end, or to
        the end of the trace if it has not ended. A refused request has none."""
        return replay_phases(self)

    def reason_for(self, step_index: int, request_id: str) -> str | None:
        """Why a request sat out a step: one of REASONS; None if it ran, had not arrived, or had ended."""
        step, record = self.steps[step_index], self.requests[request_id]
        if request_id in step.scheduled:
            return None
        if request_id in step.left_out:
            return step.left_out[request_id]
        outside = self.ended_outside.get(request_id)
        ended = (request_id in self.rejected or (outside is not None and outside[0] <= step.start_s)
                 or any(request_id in earlier.finished for earlier in self.steps[:step_index]))
        return None if ended or record.arrival_s > step.start_s else BEHIND


def _rename_fields(content: dict[str, Any]) -> None:
    """Brings a trace of schema 1 to this schema, in place; what is malformed is left for the checks that follow."""
    for step in content["steps"] if isinstance(content.get("steps"), list) else ():
        if isinstance(step, dict):
            for old, new in RENAMED.items():
                if old in step:
                    step[new] = step.pop(old)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _plain(record: Any) -> dict[str, Any]:
    """A dataclass's own fields, not copied: they are plain data already, and a long run has millions."""
    return {entry.name: getattr(record, entry.name) for entry in fields(record)}


def _record(kind: type[Record], values: Any, where: str) -> Record:
    """A dataclass from its JSON object; a field too many or too few is named."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(values).__name__}")
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    if unexpected := sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown field {unexpected[0]!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
