"""Measures a runner and fits the latency model to it: the offline half of the paper's cost model.

Prefills, decodes and mixed batches of several sizes run on the real runner, with arbitrary data in its cache. The
result is cached on disk under a key of everything that changes speed, so each machine spends the minute only once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence

import torch

from bros_ref.config import KVCacheConfig, cdiv
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.environment import cpu_model
from bros_ref.files import keep_cached, read_cached
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import Request, RequestClass
from bros_ref.scheduler.latency_model import StepFeatures, StepLatencyModel
from bros_ref.scheduler.output import SchedulerOutput

Batch = Sequence[tuple[int, int]]  # one (new tokens, context tokens) a sequence
ROUNDS = 3
PREFILLS: tuple[Batch, ...] = tuple([(new, context)] for new, context in
                                    ((2, 0), (8, 0), (32, 0), (128, 0), (256, 0), (512, 0), (64, 192), (128, 384)))
DECODES: tuple[Batch, ...] = tuple([(1, context)] * count for count in (1, 2, 4, 8, 16, 32) for context in (63, 383))
MIXED: tuple[Batch, ...] = tuple([(new, 0)] + [(1, 191)] * count for new, count in ((32, 4), (64, 8), (128, 8)))
RESTORED_SLOTS = 64


def fit_latency_model(runner: ModelRunner, max_num_seqs: int, name: str, *, refit: bool = False,
                      on_progress: Callable[[float], None] | None = None) -> StepLatencyModel:
    """The runner's latency model, from the cache if this setting was measured before on this machine.

    Args:
        name: what model the runner holds; part of the cache key.
        refit: measure again.
        on_progress: called with the fraction done.
    """
    cached_as = f"latency-{speed_key(runner, max_num_seqs, name)}.json"
    if not refit and (text := read_cached(cached_as)) is not None:
        try:
            stored = json.loads(text)
            samples = [(StepFeatures(**features), seconds) for features, seconds in stored["samples"]]
            return StepLatencyModel.fit(samples, stored["restore_s_per_token"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # damaged or of an older version: measure again
    samples = profile(runner, max_num_seqs, on_progress)
    restore_s = measure_restore_s_per_token(runner)
    plain = [[{slot: getattr(features, slot) for slot in StepFeatures.__slots__}, seconds]
             for features, seconds in samples]
    keep_cached(cached_as, json.dumps({"samples": plain, "restore_s_per_token": restore_s}))
    return StepLatencyModel.fit(samples, restore_s)


def profile(runner: ModelRunner, max_num_seqs: int, on_progress: Callable[[float], None] | None = None,
            candidates: Sequence[Batch] = (*PREFILLS, *DECODES, *MIXED)) -> list[tuple[StepFeatures, float]]:
    """Times every candidate batch that fits the runner's pool, ROUNDS times in rotation, after one warm-up round of the
    small ones. Returns (features, seconds), the fastest of each: a foreign process can only make a step slower, and how
    much slower steps are in service is the online safety factor's business. Overwrites the runner's cache."""
    config, batches = runner.kv.config, _fitting(runner, max_num_seqs, candidates)
    outputs = [_batch_output(batch, config) for batch in batches]
    fastest_s = [math.inf] * len(batches)
    for round_ in range(-1, ROUNDS):
        for index, batch in enumerate(batches):
            if round_ < 0 and sum(new for new, _ in batch) > 32:
                continue
            start_s = time.perf_counter()
            runner.execute(outputs[index])
            if round_ < 0:
                continue
            fastest_s[index] = min(fastest_s[index], time.perf_counter() - start_s)
            if on_progress is not None:
                on_progress((round_ * len(batches) + index + 1) / (ROUNDS * len(batches)))
    return [(output.features, seconds) for output, seconds in zip(outputs, fastest_s, strict=True)]


def measure_restore_s_per_token(runner: ModelRunner) -> float:
    """Seconds to copy one slot back from the host store, measured on RESTORED_SLOTS at once."""
    config = runner.kv.config
    count = min(RESTORED_SLOTS, config.num_slots, config.host_blocks * config.block_size)
    if count == 0:
        return 0.0
    pairs = [(slot, slot) for slot in range(count)]
    runner.kv.run_copies(checkpoint=pairs)
    seconds = []
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        runner.kv.run_copies(restore=pairs)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        seconds.append(time.perf_counter() - start_s)
    return sorted(seconds)[ROUNDS // 2] / count


def _fitting(runner: ModelRunner, max_num_seqs: int, candidates: Sequence[Batch]) -> list[Batch]:
    config = runner.kv.config
    room = min(config.num_slots, runner.model.config.max_context_tokens)
    return [batch for batch in candidates if len(batch) <= max_num_seqs and _slots_needed(batch, config) <= room]


def _slots_needed(batch: Batch, config: KVCacheConfig) -> int:
    return sum(cdiv(new + context, config.block_size) * config.block_size for new, context in batch)


def _batch_output(batch: Batch, config: KVCacheConfig) -> SchedulerOutput:
    """A decision that runs exactly this batch."""
    manager, output = KVCacheManager(config), SchedulerOutput(0, 0.0)
    for index, (new, context) in enumerate(batch):
        request = Request(f"profile-{index}", RequestClass.BEST_EFFORT, [1] * (new + context))
        request.num_computed_tokens = context
        table = manager.allocate_slots(request, new + context)
        assert table is not None
        output.requests.append(request)
        output.num_scheduled_tokens.append(new)
        output.block_tables.append(table)
        output.features.add(new, context)
    return output


def speed_key(runner: ModelRunner, max_num_seqs: int, name: str) -> str:
    """A digest of everything that changes what `profile` measures. The pool's size does so only by the batches that
    fit it: a pool sized to the free memory is a little different each time."""
    device = torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else cpu_model()
    key = ("fastest, weights in pieces", name, repr(runner.model.config), device, runner.backend, torch.__version__,
           torch.get_num_threads(), os.cpu_count(), str(runner.kv.data.dtype), runner.kv.config.block_size,
           _fitting(runner, max_num_seqs, (*PREFILLS, *DECODES, *MIXED)))
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]
