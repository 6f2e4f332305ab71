"""OBSERVE: every step with its reasons, and what can be derived from it."""

from bros_ref.kv_cache.blocks import BlockView
from bros_ref.scheduler.output import (
    BATCH_CAP,
    BEHIND,
    DEADLINE,
    NO_BLOCKS,
    REASONS,
    TOKEN_BUDGET,
)
from bros_ref.trace.records import (
    DECODE,
    PENDING,
    PHASES,
    PREFILL,
    RESTORING,
    WAITING,
    PhaseSpan,
    RequestRecord,
    SlotCopies,
    StepRecord,
)
from bros_ref.trace.trace import KIND, SCHEMA, Trace

__all__ = ["BATCH_CAP", "BEHIND", "DEADLINE", "DECODE", "KIND", "NO_BLOCKS", "PENDING", "PHASES", "PREFILL",
           "REASONS", "RESTORING", "SCHEMA", "TOKEN_BUDGET", "WAITING", "BlockView", "PhaseSpan", "RequestRecord",
           "SlotCopies", "StepRecord", "Trace"]
