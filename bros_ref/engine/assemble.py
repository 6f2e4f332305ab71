"""Puts scheduler, KV accounting, trace and engine around a runner: the one builder of live and simulated systems.

It needs no torch: the caller brings the runner and says what it computes with and on which device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bros_ref.clock import Clock
from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.engine.llm_engine import LLMEngine, Runner
from bros_ref.environment import environment_stamp
from bros_ref.scheduler import CHUNKED_POLICIES, make_scheduler
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.trace.trace import Trace

if TYPE_CHECKING:
    from bros_ref.model.tokenizer import Tokenizer


class EngineLimits(Protocol):
    """What the builder reads of `LiveSettings` and of `SimulationSettings`, both dataclasses. `chunked_prefill` None:
    the policy's own default, off for BROS."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def chunked_prefill(self) -> bool | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def rt_slowdown(self) -> float | None: ...


@dataclass(frozen=True)
class RunnerFacts:
    """What the scheduler and the trace are told about the model and the device behind a runner."""

    model: str
    device: str
    slot_bytes: int  # K and V of one token, over all layers
    max_context_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int | None = None


def assemble_engine(policy: str, runner: Runner, facts: RunnerFacts, kv_config: KVCacheConfig, limits: EngineLimits,
                    clock: Clock, *, latency: StepLatencyModel | None = None, tokenizer: Tokenizer | None = None,
                    trace_type: type[Trace] | None = Trace, environment: Mapping[str, Any] | None = None) -> LLMEngine:
    """Builds an engine for one run of one policy.

    Args:
        latency: None: the scheduler learns step times from its first steps on; the trace's header says so.
        trace_type: the class that records the run; None: no trace.
        environment: entries to add to the trace's stamp.

    Raises:
        ValueError: unknown policy.
    """
    chunked = policy in CHUNKED_POLICIES if limits.chunked_prefill is None else limits.chunked_prefill
    config = SchedulerConfig(limits.max_num_seqs, limits.max_num_batched_tokens, chunked, facts.max_context_tokens,
                             rt_slowdown=limits.rt_slowdown)
    scheduler = make_scheduler(policy, config, kv_config, latency, facts.eos_token_ids)
    trace = None
    if trace_type is not None:
        fitted = scheduler.latency.is_fitted
        stamp = {**environment_stamp(), **(environment or {}), "settings": dict(vars(limits)),
                 "chunked_prefill": scheduler.config.chunked_prefill, "host_blocks": kv_config.host_blocks,
                 "latency_model": "fitted offline" if fitted else "learned online, from the first steps on"}
        trace = trace_type(policy, facts.model, facts.device, kv_config.num_blocks, kv_config.block_size,
                           facts.slot_bytes, limits.seed, stamp)
    return LLMEngine(scheduler, runner, clock, tokenizer, trace, facts.vocab_size, limits.seed)
