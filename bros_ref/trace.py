"""What happened, step by step, and why: the one thing that metrics, reports, widgets and tests read.

A `Trace` is plain data (strings, numbers, lists): it saves to JSON, replays without an engine, and two runs compare
with `==`. It knows no scheduler and no cache; the engine fills it. Invariant: everything a figure shows can be
derived from the trace alone, including the owner of every slot at every step (`pool_at`).
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1

# Why a runnable request sat out a step.
DEADLINE = "deadline"  # taking it would make the most urgent real-time request late
NO_BLOCKS = "no_blocks"  # its KV does not fit now
BATCH_CAP = "batch_cap"  # every seat of the batch is taken
TOKEN_BUDGET = "token_budget"  # the step's tokens are used up
BEHIND = "behind"  # it stands behind one that could not be taken
REASONS = (DEADLINE, NO_BLOCKS, BATCH_CAP, TOKEN_BUDGET, BEHIND)


@dataclass(slots=True)
class RequestRecord:
    """A request as it arrived. Times in seconds on the run's clock; `slo` fields are None for best-effort."""

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
        lost: [request id, logical index, tokens of that block that live on the host only], whenever it changes.
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
    `overwritten` are no longer there (they live on the host)."""

    rt_owner: str | None = None
    rt_fill: int = 0
    be_owner: str | None = None
    be_fill: int = 0
    overwritten: int = 0

    @property
    def state(self) -> str:
        if self.rt_owner is not None and self.be_owner is not None:
            return "shared"
        if self.rt_owner is not None:
            return "rt_only"
        return "empty" if self.be_owner is None else "be_only"


@dataclass
class Trace:
    """A run: header, requests, steps. `slot_bytes` is the size of one token's K and V over all layers."""

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
