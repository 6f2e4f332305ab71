"""The engine against other engines (`engine_peers.py`), same weights, same machine, alternating in one run.

    offline-32x128+64   32 requests of 128 + 64 tokens at once              (a static batch of 32 in transformers)
    mixed-64            64 requests of 16-256 + 8-128 tokens                (padded static batches of 32 there)
    decode-1, -8, -32   so many sequences of 16 + 48 tokens; for one, how that compares with reading the weights once
    prefill-512         one prompt of 512 tokens; and which share of the machine's matrix rate it reaches

Throughput is output tokens per second of wall time; every case is repeated and the median kept. A peer's ratio is the
median over rounds of its time over ours. No peer is a requirement of the project: the result names those that are
missing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bros_ref.config import KVCacheConfig, SchedulerConfig, cdiv
from bros_ref.engine.build import LoadedModel
from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.evaluation.bench.engine_peers import (
    STATIC_BATCH,
    TOKEN_BUDGET,
    Lengths,
    Peer,
    draw_prompts,
    start_peers,
)
from bros_ref.evaluation.bench.machine import matrix_flops_per_s, read_bytes_per_s
from bros_ref.evaluation.bench.memory import PeakMemory
from bros_ref.request import Request, RequestClass, SamplingParams
from bros_ref.scheduler import make_scheduler

CASES = ("offline-32x128+64", "mixed-64", "decode-1", "decode-8", "decode-32", "prefill-512")


@dataclass
class EngineRow:
    """One measured case of one system. `ms_per_step` is an iteration of ours, or a token of a static batch of
    transformers. `peak_rss_bytes` is the highest of this row's own runs (`memory.py`), with the weights of both systems
    in it. None: not known; for a peer in a process of its own, neither is."""

    system: str
    case: str
    output_tok_s: float
    ms_per_step: float | None
    peak_rss_bytes: int | None


def mixed_lengths(count: int, seed: int) -> Lengths:
    """Seeded requests of 16-256 prompt and 8-128 output tokens."""
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(16, 257)), int(rng.integers(8, 129))) for _ in range(count)]


def run_ours(loaded: LoadedModel, lengths: Lengths, seed: int) -> list[float]:
    """Seconds of each step that serves the requests: all present from the start, first come first served."""
    slots = sum(cdiv(prompt + output, 16) for prompt, output in lengths)
    kv_config = KVCacheConfig(min(slots, 1024))
    runner = ModelRunner(loaded.model, kv_config, loaded.device, loaded.dtype)
    config = SchedulerConfig(max_num_seqs=STATIC_BATCH, max_num_batched_tokens=TOKEN_BUDGET, chunked_prefill=True)
    engine = LLMEngine(make_scheduler("vllm-fcfs", config, kv_config), runner)
    prompts = draw_prompts(lengths, loaded.config.vocab_size, seed)
    for index, (token_ids, (_, output)) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add_request(Request(str(index), RequestClass.BEST_EFFORT, token_ids,
                                   SamplingParams(max_tokens=output, ignore_eos=True)))
    steps_s = []
    while engine.has_unfinished:
        start_s = time.perf_counter()
        engine.step()
        steps_s.append(time.perf_counter() - start_s)
    return steps_s


def bench_engine(loaded: LoadedModel, cases: Sequence[str] = CASES, rounds: int = 3, seed: int = 0,
                 on_case: Callable[[str], None] | None = None, peers: Sequence[str] = ("transformers",),
                 vllm_python: Path | None = None) -> dict[str, Any]:
    """The chosen cases against the chosen peers (of `PEERS`); the shape that `bros-ref bench engine --json` promises,
    without the stamp.

    Raises:
        ValueError: an unknown case.
        Unavailable: a peer failed after it had started.
    """
    if unknown := set(cases) - set(CASES):
        raise ValueError(f"unknown case {sorted(unknown)[0]!r}; known are {', '.join(CASES)}")
    all_lengths = dict(zip(CASES, ([(128, 64)] * 32, mixed_lengths(64, seed), [(16, 48)], [(16, 48)] * 8,
                                   [(16, 48)] * 32, [(512, 1)]), strict=True))
    rows: list[EngineRow] = []
    with start_peers(loaded, peers, vllm_python) as (others, absent):
        ratios: dict[str, dict[str, float]] = {peer.name: {} for peer in others}
        for case in cases:
            taken, speedups = _alternate(loaded, case, all_lengths[case], others, rounds, seed, on_case)
            rows += taken
            for name, speedup in speedups.items():
                ratios[name][case] = speedup
        versions = {peer.name: peer.version for peer in others}
    return {"rows": [vars(row) for row in rows], "speedup_over": ratios, "versions": versions, "absent": absent,
            **_against_the_machine(loaded)}


def _alternate(loaded: LoadedModel, case: str, lengths: Lengths, peers: Sequence[Peer], rounds: int, seed: int,
               on_case: Callable[[str], None] | None) -> tuple[list[EngineRow], dict[str, float]]:
    """One case, ours and every peer in each round: the rows, and how many times as fast as each peer ours is."""
    ours: list[list[float]] = []
    theirs: dict[str, list[float]] = {peer.name: [] for peer in peers}
    peaks: dict[str, list[int | None]] = {name: [] for name in ("bros_ref", *theirs)}
    for _ in range(rounds):
        if on_case is not None:
            on_case(case)
        with PeakMemory() as peak:
            ours.append(run_ours(loaded, lengths, seed))
        peaks["bros_ref"].append(peak.bytes)
        for peer in peers:
            with PeakMemory() as peak:
                theirs[peer.name].append(peer.seconds(lengths, seed))
            peaks[peer.name].append(peak.bytes if peer.in_this_process else None)
    tokens = sum(output for _, output in lengths)
    seconds = statistics.median(map(sum, ours))
    rows = [EngineRow("bros_ref", case, tokens / seconds, 1e3 * seconds / len(ours[0]), _highest(peaks["bros_ref"]))]
    for peer in peers:
        seconds = statistics.median(theirs[peer.name])
        steps = sum(max(output for _, output in lengths[i:i + STATIC_BATCH])
                    for i in range(0, len(lengths), STATIC_BATCH))
        rows.append(EngineRow(peer.name, case, tokens / seconds,
                              1e3 * seconds / steps if peer.in_this_process else None, _highest(peaks[peer.name])))
    return rows, {name: statistics.median(other / sum(own) for own, other in zip(ours, times, strict=True))
                  for name, times in theirs.items()}


def _against_the_machine(loaded: LoadedModel) -> dict[str, float]:
    """One decode against one reading of the weights; one prefill against the matrix rate. Alternated; the fastest step
    is compared with the fastest reading, since other work on the machine can only make either slower."""
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in loaded.parameters.values())
    multiplied = weight_bytes // 4 - loaded.config.vocab_size * loaded.config.hidden_size * (
        1 if loaded.config.tied_embeddings else 2)
    decode_s, prefill_s, read_s, flops = [], [], [], []
    for _ in range(5):
        decode_s.append(min(run_ours(loaded, [(16, 34)], 0)[1:]))
        prefill_s.append(sum(run_ours(loaded, [(512, 1)], 0)))
        read_s.append(weight_bytes / read_bytes_per_s(weight_bytes))
        flops.append(matrix_flops_per_s())
    rate = 2 * 512 * multiplied / min(prefill_s)
    return {"weights_bytes": weight_bytes, "weights_read_s": min(read_s), "decode1_s": min(decode_s),
            "decode1_over_weights_read": min(decode_s) / min(read_s), "prefill512_flops_per_s": rate,
            "matrix_flops_per_s": max(flops), "prefill512_share_of_matrix_rate": rate / max(flops)}


def _highest(peaks: Sequence[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)
