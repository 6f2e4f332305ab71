"""What happened, step by step, and why: the one thing that metrics, reports, widgets and tests read.

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
from typing import Any, TypeVar

KIND = "bros_ref.trace"  # tells a trace from any other JSON file
SCHEMA = 1

# Why a runnable request sat out a step.
DEADLINE = "deadline"  # taking it would make the most urgent real-time request late
NO_BLOCKS = "no_blocks"  # its KV does not fit now
BATCH_CAP = "batch_cap"  # every seat of the batch is taken
TOKEN_BUDGET = "token_budget"  # the step's tokens are used up
BEHIND = "behind"  # it stands behind one that could not be taken
REASONS = (DEADLINE, NO_BLOCKS, BATCH_CAP, TOKEN_BUDGET, BEHIND)

# What a request is doing at a moment of its life.
WAITING = "waiting"  # holds no KV: never ran, or lost it all to a recompute preemption
PREFILL = "prefill"  # computing tokens that were known before: the prompt, or everything after a preemption
DECODE = "decode"  # computing the newest token only
PENDING = "pending"  # holds KV (on the device or the host) and sits out
RESTORING = "restoring"  # runs in a step that copies its KV back from the host
PHASES = (WAITING, PREFILL, DECODE, PENDING, RESTORING)

Record = TypeVar("Record")


@dataclass(slots=True)
class RequestRecord:
    """A request as it arrived. Times in seconds on the run's clock; `slo` fields are None for best-effort.

    `request_class` is "rt" or "be". A refused request has a record too: it counts as arrived, and as missed.
    """

    request_id: str
    request_class: str
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None


@dataclass(slots=True)
class StepRecord:
    """One iteration: the decision, its reasons, and what it came to.

    Attributes:
        start_s, duration_s: when the iteration began and how long the runner took (decision not included).
        schedule_s: how long the decision took, CPU seconds.
        predicted_s: what the latency model said, without the safety factor; None if the policy predicts nothing.
        bound_s: the longest iteration the deadlines allowed; None if nothing bound it.
        binding: the reason that ended the packing, one of REASONS, or None when everything runnable ran.
        scheduled: request id -> tokens computed.
        emitted: ids that got an output token at `start_s + duration_s`.
        finished: request id -> "length" | "stop" | "aborted" | "failed".
        preempted: request id -> "recompute" | "swap": lost its KV, or had it all moved to the host.
        slack_s: request id -> slack of every real-time request that was looked at.
        left_out: request id -> reason. A runnable request that is not listed is BEHIND the listed ones.
        num_behind: how many those are.
        block_changes: [request id, logical index, block id] in order; block -1: that part is on the host or gone;
            index -1: the request's whole table is gone.
        lost: [request id, logical index, tokens of that block that live on the host only], whenever it changes; a
            table that is dropped in the same step was dropped after that.
        copied: slots copied by this step: "checkpoint" device -> host, "restore" host -> device, "relocate" within
            the device.
        recomputed_tokens: computed tokens that preemptions of this step threw away.
        num_waiting, num_running: queue lengths after the decision.
        used_blocks: blocks with an owner, after the decision.
    """

    step: int
    start_s: float
    duration_s: float
    schedule_s: float
    predicted_s: float | None
    bound_s: float | None
    binding: str | None
    scheduled: dict[str, int]
    emitted: list[str]
    finished: dict[str, str]
    preempted: dict[str, str]
    slack_s: dict[str, float]
    left_out: dict[str, str]
    num_behind: int
    block_changes: list[list[Any]]
    lost: list[list[Any]]
    copied: dict[str, int]
    recomputed_tokens: int
    num_waiting: int
    num_running: int
    used_blocks: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


@dataclass(slots=True)
class BlockView:
    """One block at one moment. RT tokens fill slots from the left; BE tokens from the right, of which the newest
    `overwritten` are no longer there (they live on the host).

    `rt_index`, `be_index`: which logical block of its owner this is, so that a figure can name token positions; two
    views of the same slots are equal whether or not their maker filled them in.
    """

    rt_owner: str | None = None
    rt_fill: int = 0
    be_owner: str | None = None
    be_fill: int = 0
    overwritten: int = 0
    rt_index: int = field(default=0, compare=False)
    be_index: int = field(default=0, compare=False)

    @property
    def state(self) -> str:
        """"empty" | "rt_only" | "be_only" | "shared"."""
        if self.rt_owner is not None and self.be_owner is not None:
            return "shared"
        if self.rt_owner is not None:
            return "rt_only"
        return "empty" if self.be_owner is None else "be_only"


@dataclass(slots=True)
class PhaseSpan:
    """A stretch of one request's life, [start_s, end_s], over `steps` iterations that computed `tokens` tokens."""

    phase: str
    start_s: float
    end_s: float
    steps: int = 0
    tokens: int = 0


@dataclass(slots=True)
class SlotCopies:
    """Adjacent slots of one block that a step copied. `kind` is a key of `StepRecord.copied`; `block_id` is the block
    that a checkpoint read, or that a restore or a relocation wrote."""

    kind: str
    request_id: str
    block_id: int
    first_slot: int
    num_slots: int


@dataclass
class Trace:
    """A run: header, requests, steps. `slot_bytes` is the size of one token's K and V over all layers.

    Every number is finite: JSON has no NaN and no infinity, and "nothing bound it" is None.
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
        try:
            data = path.read_bytes()
            content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a trace, or cut short: {error}; expected JSON written by Trace.save "
                             "(gzipped if and only if the name ends in .gz)") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f'{path}: not a trace: expected a JSON object with "kind": "{KIND}"')
        if content.get("schema") != SCHEMA:
            raise ValueError(f"{path}: trace schema {content.get('schema')!r}, but this version reads schema {SCHEMA} "
                             "only; record the run again, or use the version that wrote it")
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
        from bros_ref.perfetto import trace_events  # here, because it needs the records above

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
        from bros_ref.replay import replay_pools  # here, because it needs the records above

        return replay_pools(self)

    def copies(self) -> Iterator[list[SlotCopies]]:
        """The slots that each step saved to the host, brought back or moved, from the first step on."""
        from bros_ref.replay import replay_copies  # here, because it needs the records above

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
        from bros_ref.replay import replay_phases  # here, because it needs the records above

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


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, gzipped if the name ends in `.gz`; no time stamp inside, so equal text gives equal bytes."""
    data = text.encode()
    path.write_bytes(gzip.compress(data, compresslevel=6, mtime=0) if path.suffix == ".gz" else data)


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
