"""The engine against `transformers.generate`, same weights, same machine, alternating in one run.

    offline-32x128+64   32 requests of 128 + 64 tokens at once              (a static batch of 32 there)
    mixed-64            64 requests of 16-256 + 8-128 tokens                (padded static batches of 32 there)
    decode-1            one sequence, per token; and how that compares with reading the weights once
    prefill-512         one prompt of 512 tokens; and which share of the machine's matrix rate it reaches

Throughput is output tokens per second of wall time; every case is repeated and the median kept. transformers is not
a requirement of the project: without it its rows are left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bros_ref.config import KVCacheConfig, SchedulerConfig, cdiv
from bros_ref.engine.build import LoadedModel
from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.evaluation.bench.machine import matrix_flops_per_s, read_bytes_per_s
from bros_ref.evaluation.bench.memory import PeakMemory
from bros_ref.evaluation.bench.reference import transformers_llama
from bros_ref.request import Request, RequestClass, SamplingParams
from bros_ref.scheduler import make_scheduler

Lengths = list[tuple[int, int]]  # (prompt tokens, output tokens) a request
STATIC_BATCH = 32
CASES = ("offline-32x128+64", "mixed-64", "decode-1", "prefill-512")


@dataclass
class EngineRow:
    """One measured case. `ms_per_step` is an iteration of ours, or a token of a static batch. `peak_rss_bytes` is the
    highest of this row's own runs (`memory.py`), with the weights of both systems in it; None if it is not known."""

    system: str
    case: str
    output_tok_s: float | None
    ms_per_step: float
    peak_rss_bytes: int | None


def mixed_lengths(count: int, seed: int) -> Lengths:
    """Seeded requests of 16-256 prompt and 8-128 output tokens."""
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(16, 257)), int(rng.integers(8, 129))) for _ in range(count)]


def run_ours(loaded: LoadedModel, lengths: Lengths, seed: int) -> tuple[float, int]:
    """Seconds and steps to serve the requests, all present from the start, first come first served (vllm-fcfs)."""
    slots = sum(cdiv(prompt + output, 16) for prompt, output in lengths)
    kv_config = KVCacheConfig(min(slots, 1024))
    runner = ModelRunner(loaded.model, kv_config, loaded.device, loaded.dtype)
    config = SchedulerConfig(max_num_seqs=STATIC_BATCH, max_num_batched_tokens=1024, chunked_prefill=True)
    engine = LLMEngine(make_scheduler("vllm-fcfs", config, kv_config), runner)
    rng = np.random.default_rng(seed)
    for index, (prompt, output) in enumerate(lengths):
        token_ids = rng.integers(3, loaded.config.vocab_size, prompt).tolist()
        engine.add_request(Request(str(index), RequestClass.BEST_EFFORT, token_ids,
                                   SamplingParams(max_tokens=output, ignore_eos=True)))
    start_s, steps = time.perf_counter(), 0
    while engine.has_unfinished:
        engine.step()
        steps += 1
    return time.perf_counter() - start_s, steps


def reference_model(loaded: LoadedModel) -> Any | None:
    """transformers on the same weights; None where it is not installed or has no such model."""
    try:
        return transformers_llama(loaded.config, loaded.parameters)
    except (ImportError, ValueError):
        return None


def run_reference(model: Any, lengths: Lengths, vocab_size: int, seed: int) -> float:
    """Seconds of `generate` over static batches of STATIC_BATCH: prompts padded on the left, and every sequence of a
    batch runs as long as its longest output. In order of arrival, as a server without continuous batching would."""
    rng = np.random.default_rng(seed)
    start_s = time.perf_counter()
    for first in range(0, len(lengths), STATIC_BATCH):
        batch = lengths[first:first + STATIC_BATCH]
        width, output = max(prompt for prompt, _ in batch), max(output for _, output in batch)
        token_ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        for row, (prompt, _) in enumerate(batch):
            token_ids[row, width - prompt:] = torch.from_numpy(rng.integers(3, vocab_size, prompt))
            mask[row, width - prompt:] = 1
        with torch.inference_mode():
            model.generate(input_ids=token_ids, attention_mask=mask, min_new_tokens=output, max_new_tokens=output,
                           do_sample=False, pad_token_id=0)
    return time.perf_counter() - start_s


def bench_engine(loaded: LoadedModel, cases: Sequence[str] = CASES, rounds: int = 3, seed: int = 0,
                 on_case: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The chosen cases; the shape that `bros-ref bench engine --json` promises, without the stamp.

    Raises:
        ValueError: an unknown case.
    """
    if unknown := set(cases) - set(CASES):
        raise ValueError(f"unknown case {sorted(unknown)[0]!r}; known are {', '.join(CASES)}")
    reference = reference_model(loaded)
    all_lengths = dict(zip(CASES, ([(128, 64)] * 32, mixed_lengths(64, seed), [(16, 48)], [(512, 1)]), strict=True))
    rows, ratios = [], {}
    for case in cases:
        lengths = all_lengths[case]
        ours, theirs = [], []
        our_peaks, their_peaks = list[int | None](), list[int | None]()
        for _ in range(rounds):
            if on_case is not None:
                on_case(case)
            with PeakMemory() as peak:
                ours.append(run_ours(loaded, lengths, seed))
            our_peaks.append(peak.bytes)
            if reference is not None:
                with PeakMemory() as peak:
                    theirs.append(run_reference(reference, lengths, loaded.config.vocab_size, seed))
                their_peaks.append(peak.bytes)
        tokens = sum(output for _, output in lengths)
        seconds = statistics.median(run[0] for run in ours)
        rows.append(EngineRow("bros_ref", case, tokens / seconds, 1e3 * seconds / ours[0][1], _highest(our_peaks)))
        if theirs:
            seconds = statistics.median(theirs)
            steps = sum(max(output for _, output in lengths[i:i + STATIC_BATCH])
                        for i in range(0, len(lengths), STATIC_BATCH))
            rows.append(EngineRow("transformers", case, tokens / seconds, 1e3 * seconds / steps,
                                  _highest(their_peaks)))
            ratios[case] = statistics.median(other / own[0] for own, other in zip(ours, theirs, strict=True))
    return {"rows": [vars(row) for row in rows], "speedup_over_transformers": ratios, **_against_the_machine(loaded)}


def _against_the_machine(loaded: LoadedModel) -> dict[str, float]:
    """One decode against one reading of the weights; one prefill against the matrix rate. Alternated, best of five."""
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in loaded.parameters.values())
    multiplied = weight_bytes // 4 - loaded.config.vocab_size * loaded.config.hidden_size * (
        1 if loaded.config.tied_embeddings else 2)
    decode_s, prefill_s, read_s, flops = [], [], [], []
    for _ in range(5):
        short, _steps = run_ours(loaded, [(16, 2)], 0)
        long, _steps = run_ours(loaded, [(16, 34)], 0)
        decode_s.append((long - short) / 32)
        prefill_s.append(run_ours(loaded, [(512, 1)], 0)[0])
        read_s.append(weight_bytes / read_bytes_per_s(weight_bytes))
        flops.append(matrix_flops_per_s())
    rate = 2 * 512 * multiplied / min(prefill_s)
    return {"weights_bytes": weight_bytes, "weights_read_s": min(read_s), "decode1_s": min(decode_s),
            "decode1_over_weights_read": min(decode_s) / min(read_s), "prefill512_flops_per_s": rate,
            "matrix_flops_per_s": max(flops), "prefill512_share_of_matrix_rate": rate / max(flops)}


def _highest(peaks: Sequence[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)
