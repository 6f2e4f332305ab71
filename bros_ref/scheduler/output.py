"""`SchedulerOutput`: everything the runner sees of a decision, and everything the trace sees of its reasons.

Nothing else passes from the scheduler to the runner. A live runner and a simulated one read the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from bros_ref.kv_cache.blocks import KVChanges
from bros_ref.request import Request
from bros_ref.scheduler.latency_model import StepFeatures

# What became of a candidate: it is in the batch, or why it sits out this step although it could run.
Admission = Literal["admitted", "deadline", "no_blocks", "batch_cap", "token_budget"]
ADMITTED: Final = "admitted"
DEADLINE: Final = "deadline"  # taking it would make the most urgent real-time request late
NO_BLOCKS: Final = "no_blocks"  # its KV does not fit now
BATCH_CAP: Final = "batch_cap"  # every seat of the batch is taken
TOKEN_BUDGET: Final = "token_budget"  # the step's tokens are used up
BEHIND: Final = "behind"  # nobody asked: it stands behind one that could not be taken
REASONS = (DEADLINE, NO_BLOCKS, BATCH_CAP, TOKEN_BUDGET, BEHIND)


@dataclass(slots=True)
class SchedulerOutput:
    """One step's batch. `requests`, `num_scheduled_tokens` and `block_tables` are parallel, in batch order.

    A scheduled request computes its tokens [num_computed_tokens, num_computed_tokens + num_scheduled); if that
    reaches num_tokens, the runner samples its next token. Block tables belong to the cache manager: they are valid
    for this step only, and already have room for the scheduled tokens. `kv_changes.copies` run before the forward.
    """

    # what to compute
    step: int
    now_s: float
    requests: list[Request] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    kv_changes: KVChanges = field(default_factory=KVChanges)
    # why
    features: StepFeatures = field(default_factory=StepFeatures)
    predicted_s: float = 0.0  # without the safety factor
    step_budget_s: float | None = None  # the longest iteration that the deadlines allowed, at the end of packing
    binding: str | None = None  # the reason that ended the packing
    slack_s: dict[str, float] = field(default_factory=dict)  # of each real-time request that was looked at
    left_out: dict[str, str] = field(default_factory=dict)  # request id -> reason
    num_behind: int = 0  # runnable requests that are neither scheduled nor in left_out: they stand behind those
    preempted: dict[str, str] = field(default_factory=dict)  # request id -> "recompute" | "swap"
    recomputed_tokens: int = 0
    rejected: list[str] = field(default_factory=list)  # turned away by the policy; the engine aborts them
    num_waiting: int = 0
    num_running: int = 0
    num_used_blocks: int = 0
