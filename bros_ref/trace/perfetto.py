"""A trace as trace-event JSON, the format that Perfetto and chrome://tracing open.

Three groups of tracks: the engine's steps with their decisions as arguments and counters for blocks and queues; one
track for each real-time request; one for each best-effort request. It derives nothing itself: spans come from
`Trace.phases`. Invariant: slices of one track never overlap, which the format requires.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bros_ref.trace.records import StepRecord

if TYPE_CHECKING:
    from bros_ref.trace.trace import Trace

Event = dict[str, Any]

_ENGINE = 1  # process ids; a "process" is a group of tracks
_GROUPS = {"rt": (2, "real-time requests"), "be": (3, "best-effort requests")}


def trace_events(trace: Trace) -> list[Event]:
    """The list that goes under "traceEvents". Times and durations in microseconds, as the format wants them."""
    events = [_name("process_name", _ENGINE, 0, f"engine: {trace.policy}, {trace.model}"),
              _name("thread_name", _ENGINE, 1, "steps")]
    events += [_name("process_name", pid, 0, title) for pid, title in _GROUPS.values()]
    for step in trace.steps:
        events += _step_events(step)
    events += _request_events(trace)
    return events


def _step_events(step: StepRecord) -> list[Event]:
    args = {"step": step.step, "requests": len(step.scheduled), "tokens": sum(step.scheduled.values()),
            "schedule_us": step.schedule_s * 1e6, "predicted_s": step.predicted_s, "step_budget_s": step.step_budget_s,
            "binding": step.binding, "scheduled": step.scheduled, "finished": step.finished,
            "preempted": step.preempted, "left_out": step.left_out, "behind": step.num_behind, "copied": step.copied}
    slice_ = {"ph": "X", "pid": _ENGINE, "tid": 1, "name": f"step {step.step}", "ts": step.start_s * 1e6,
              "dur": step.duration_s * 1e6, "args": args}
    counters = {"KV blocks": {"used": step.used_blocks},
                "queues": {"waiting": step.num_waiting, "running": step.num_running}}
    return [slice_] + [{"ph": "C", "pid": _ENGINE, "name": name, "ts": step.start_s * 1e6, "args": values}
                       for name, values in counters.items()]


def _request_events(trace: Trace) -> list[Event]:
    events = []
    for tid, (request_id, spans) in enumerate(trace.phases().items(), start=1):
        record = trace.requests[request_id]
        pid, _ = _GROUPS[record.request_class]
        events.append(_name("thread_name", pid, tid, request_id))
        events += [{"ph": "X", "pid": pid, "tid": tid, "name": span.phase, "ts": span.start_s * 1e6,
                    "dur": (span.end_s - span.start_s) * 1e6, "args": {"steps": span.steps, "tokens": span.tokens}}
                   for span in spans]
    return events


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}
