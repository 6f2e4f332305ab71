"""Policies by name: the scheduler and the KV manager of each. Commands and tests read this one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.kv_cache.bidirectional import BidirectionalKVCacheManager
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.scheduler.base import Scheduler
from bros_ref.scheduler.baselines.qoserve import QoServeScheduler
from bros_ref.scheduler.baselines.round_robin import RoundRobinScheduler
from bros_ref.scheduler.baselines.scorpio import ScorpioScheduler
from bros_ref.scheduler.baselines.sglang_priority import SGLangPriorityScheduler
from bros_ref.scheduler.baselines.tgi import TGIScheduler
from bros_ref.scheduler.baselines.vllm_fcfs import VLLMFCFSScheduler
from bros_ref.scheduler.baselines.vllm_priority import VLLMPriorityScheduler
from bros_ref.scheduler.baselines.vllm_priority_watermark import VLLMPriorityWatermarkScheduler
from bros_ref.scheduler.baselines.vllm_v0 import VLLMV0Scheduler
from bros_ref.scheduler.baselines.xllm import XLLMScheduler
from bros_ref.scheduler.bros import BROSScheduler
from bros_ref.scheduler.latency_model import StepLatencyModel

POLICIES: dict[str, tuple[type[Scheduler], Callable[[KVCacheConfig], KVCacheManager]]] = {
    "vllm-fcfs": (VLLMFCFSScheduler, KVCacheManager),
    "vllm-v0": (VLLMV0Scheduler, KVCacheManager),
    "vllm-priority": (VLLMPriorityScheduler, KVCacheManager),
    "vllm-priority-watermark": (VLLMPriorityWatermarkScheduler, KVCacheManager),
    "tgi": (TGIScheduler, KVCacheManager),
    "sglang-priority": (SGLangPriorityScheduler, KVCacheManager),
    "scorpio": (ScorpioScheduler, KVCacheManager),
    "qoserve": (QoServeScheduler, KVCacheManager),
    "xllm": (XLLMScheduler, KVCacheManager),
    "bros-rr": (RoundRobinScheduler, KVCacheManager),
    "bros": (BROSScheduler, BidirectionalKVCacheManager),
    "bros-plus": (BROSScheduler, BidirectionalKVCacheManager),
    # ablations: scheduling as BROS, KV pressure answered otherwise
    "bros-recompute": (BROSScheduler, KVCacheManager),
    "bros-swap-request": (BROSScheduler, lambda config: BidirectionalKVCacheManager(config, "request")),
    "bros-swap-block": (BROSScheduler, lambda config: BidirectionalKVCacheManager(config, "block")),
}
# As the systems that they stand for: chunked prefill unless told otherwise, or whole prompts whatever is told.
CHUNKED_POLICIES = ("vllm-fcfs", "vllm-priority", "vllm-priority-watermark", "sglang-priority", "qoserve", "xllm")
WHOLE_PROMPT_POLICIES = ("vllm-v0", "scorpio")
# What `bros-plus` adds to the paper's form (our decisions); one alone, for ablations, is the policy `bros+NAME`.
PLUS: dict[str, dict[str, Any]] = {
    "chunks": {"chunked_prefill": True},  # prompts are cut to what the deadlines leave
    "seats": {"batch_slow_start": False},  # the deadlines bound the batch, and no cap besides
    "bank": {"rt_banks_time": True},  # an RT ahead of its mean TPOT may use that time later
    "triage": {"rt_triage": True},  # when not all RT can be on time, as many as possible are
    "tokens": {"rt_leaves_tokens": True},  # RT that have time leave BE that decode a token each in every step
    "lazy": {"rt_displaces_eagerly": False},  # RT displace RT as late as they can, and spare those that cannot wait
}
# One class alone: the floor of latency and the ceiling of throughput. A run uses whichever form serves its class better
# where it can try both (simulated runs, `bench hybrid`), and the first where it cannot.
REFERENCE_POLICIES = {"rt-only": "rt", "be-only": "be"}
REFERENCE_FORMS = ("bros-plus", "bros")


def known_policies() -> list[str]:
    """Every name that `make_scheduler` takes."""
    return [*POLICIES, *REFERENCE_POLICIES, *(f"bros+{option}" for option in PLUS)]


def make_scheduler(policy: str, config: SchedulerConfig, kv_config: KVCacheConfig,
                   latency: StepLatencyModel | None = None, eos_token_ids: Sequence[int] = ()) -> Scheduler:
    """Builds the scheduler of a policy, with its KV manager.

    Raises:
        ValueError: the policy is unknown; the message lists the known ones. Or a vLLM policy has fewer tokens per step
            than seats, which vLLM refuses too: in a full batch some requests could not decode.
    """
    if policy not in known_policies():
        raise ValueError(f"unknown policy {policy!r}; known are {', '.join(known_policies())}")
    seats, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if policy.startswith("vllm-") and tokens < seats:
        raise ValueError(f"{policy} needs max_num_batched_tokens to be at least max_num_seqs, as vLLM does, got "
                         f"{tokens} and {seats}; set max_num_batched_tokens to {seats} or more, or max_num_seqs to "
                         f"{tokens} or less")
    if policy in REFERENCE_POLICIES:
        policy = REFERENCE_FORMS[0]
    base, _, option = policy.partition("+")
    changes = [PLUS[option]] if option else PLUS.values() if base == "bros-plus" else []
    for change in changes:
        config = replace(config, **change)
    if policy in WHOLE_PROMPT_POLICIES:
        config = replace(config, chunked_prefill=False)
    scheduler, manager = POLICIES[base]
    return scheduler(config, manager(kv_config), latency, eos_token_ids)
