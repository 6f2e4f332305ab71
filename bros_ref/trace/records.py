"""The records of a trace: what each request asked for and what each step decided. Plain data, no behaviour.

`trace.py` keeps them and reads and writes their file; `replay.py` derives pools, copies and phases from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What a request is doing at a moment of its life.
WAITING = "waiting"  # holds no KV: never ran, or lost it all to a recompute preemption
PREFILL = "prefill"  # computing tokens that were known before: the prompt, or everything after a preemption
DECODE = "decode"  # computing the newest token only
PENDING = "pending"  # holds KV (on the device or the host) and sits out
RESTORING = "restoring"  # runs in a step that copies its KV back from the host
PHASES = (WAITING, PREFILL, DECODE, PENDING, RESTORING)


@dataclass(slots=True)
class RequestRecord:
    """A request as it arrived. Times in seconds on the run's clock; `slo` fields are None for best-effort.

    `request_class` is "rt" or "be". A refused request has a record too: it counts as arrived, and as missed. `seed` is
    what its samples were drawn with; None for a greedy request.
    """

    request_id: str
    request_class: str
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    seed: int | None = None


@dataclass(slots=True)
class StepRecord:
    """One iteration: the decision, its reasons, and what it came to.

    Attributes:
        start_s, duration_s: when the iteration began and how long the runner took (decision not included).
        schedule_s: how long the decision took, CPU seconds.
        predicted_s: what the latency model said, without the safety factor; None if the policy predicts nothing.
        step_budget_s: the longest iteration the deadlines allowed; None if nothing bound it.
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
        offloaded: [request id, logical index, tokens of that block that live on the host only], whenever it changes; a
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
    step_budget_s: float | None
    binding: str | None
    scheduled: dict[str, int]
    emitted: list[str]
    finished: dict[str, str]
    preempted: dict[str, str]
    slack_s: dict[str, float]
    left_out: dict[str, str]
    num_behind: int
    block_changes: list[list[Any]]
    offloaded: list[list[Any]]
    copied: dict[str, int]
    recomputed_tokens: int
    num_waiting: int
    num_running: int
    used_blocks: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


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
