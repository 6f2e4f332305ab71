"""The CUDA kernels timed on a GPU: microseconds, GB/s, share of the bandwidth that a plain copy reaches here.

A kernel whose answer is not within the contract is refused, not timed. Not measured where this was written, for lack
of a GPU, so the part that needs one (`GraphTimer`) is small, and the rest runs in tests on the emulator.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bros_ref.evaluation.bench.peers import peers
from kernels_cupy.device import Device
from kernels_cupy.heads import Heads
from kernels_cupy.launch import STEPS, copy_slots, paged_attention
from kernels_cupy.launch_prefill import prefill_attention
from kernels_cupy.proof.contract import TOLERANCE, Batch, decode, prefill

L2_FLUSH_BYTES, COPY_BYTES = 256 << 20, 1 << 30


class Timer(Protocol):
    """Times a call on the device: seconds of each of several samples, after a warm-up."""

    def __call__(self, call: Callable[[], None]) -> list[float]: ...


@dataclass(frozen=True)
class Case:
    """A decode batch: contexts of its sequences, in tokens."""

    name: str
    context_lens: tuple[int, ...]


@dataclass(frozen=True)
class PrefillCase:
    """Sequences that are alike: `queries` new tokens at the end of `context` each."""

    name: str
    num_seqs: int
    queries: int
    context: int


PREFILL_CASES = (PrefillCase("4 prompts of 2,048", 4, 2048, 2048),
                 PrefillCase("8 chunks of 256 at 4,096", 8, 256, 4096))
CASES = (Case("one of 8,192", (8192,)), Case("64 of 2,048", (2048,) * 64),
         Case("ragged, 64 of 16 to 8,192", tuple(int(16 * 512 ** (i / 63)) for i in range(64))))


class GraphTimer:
    """Seconds per call, from replays of a CUDA graph of several calls, without Python and launch gaps in between.

    The L2 cache is flushed before each call; the time of flushing is measured separately and subtracted. A call must
    allow graph capture: no growing allocation, no wait for the device.
    """

    def __init__(self, samples: int = 15, calls: int = 10) -> None:
        self.samples, self.calls = samples, calls
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._flush_s = statistics.median(self._replays(lambda: None))

    def __call__(self, call: Callable[[], None]) -> list[float]:
        return [(time_s - self._flush_s) / self.calls for time_s in self._replays(call)]

    def _replays(self, call: Callable[[], None]) -> list[float]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.calls):
                self._flush.zero_()
                call()
        times_s = []
        for _ in range(self.samples + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times_s.append(begin.elapsed_time(end) / 1e3)
        return times_s[1:]  # the first replay uploads the graph


def copy_bandwidth(timer: Timer, place: str) -> float:
    """Bytes read and written per second by a plain copy of 1 GiB: the practical limit for a kernel."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / statistics.median(timer(lambda: void(target.copy_(source))))


def bench_kernels(device: Device, timer: Timer, heads: Heads, seed: int, place: str, bandwidth: float,
                  cases: Sequence[Case] = CASES, steps: Sequence[int] = STEPS,
                  on_row: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """One row per case and system: our steps, other projects' kernels where they are installed (peers.py), and torch's
    SDPA on K and V gathered beforehand (its gather is not timed). With an fp8 cache only our steps: torch's SDPA takes
    none, and of the others' kernels not all.

    Raises:
        ArithmeticError: an answer is not within the contract; its kernel was not timed.
    """
    rows = []
    for case in cases:
        lengths = list(case.context_lens)
        batch = Batch.draw(np.random.default_rng(seed), heads, [1] * len(lengths), lengths).to(place)
        num_bytes = sum(lengths) * heads.token_bytes
        for system, call in _systems(device, batch, steps):
            times_s = timer(call)
            best_s = statistics.median(times_s)
            rows.append({"case": case.name, "system": system, "us": best_s * 1e6, "gb_per_s": num_bytes / best_s / 1e9,
                         "share_of_copy_bandwidth": num_bytes / best_s / bandwidth,
                         "samples_us": [time_s * 1e6 for time_s in times_s]})
            on_row()
    return rows


def bench_prefill(device: Device, timer: Timer, heads: Heads, seed: int, place: str,
                  cases: Sequence[PrefillCase] = PREFILL_CASES) -> list[dict[str, Any]]:
    """One row per case and system: the tensor-core prefill and, for whole prompts and a cache that is not fp8, torch's
    causal SDPA on dense K, V.
    Products count 4 operations per query, head, dimension and visible token.

    Raises:
        ArithmeticError: as `bench_kernels`.
    """
    rows = []
    for case in cases:
        queries, contexts = [case.queries] * case.num_seqs, [case.context] * case.num_seqs
        batch = Batch.draw(np.random.default_rng(seed), heads, queries, contexts).to(place)
        visible = case.num_seqs * sum(range(case.context - case.queries + 1, case.context + 1))
        operations = 4 * visible * heads.num_heads * heads.head_dim
        _verify("prefill", batch, prefill(device, batch))
        systems: list[tuple[str, Callable[[], None]]] = [("prefill", _prefill(device, batch))]
        if case.queries == case.context and not heads.is_fp8:
            systems.append(("torch SDPA, dense", _causal_sdpa(batch, case)))
        for system, call in systems:
            median_s = statistics.median(timer(call))
            rows.append({"case": case.name, "system": system, "us": median_s * 1e6,
                         "tflop_per_s": operations / median_s / 1e12})
    return rows


def bench_copies(device: Device, timer: Timer, heads: Heads, place: str, layers: int = 32,
                 slots: int = 512) -> list[dict[str, Any]]:
    """One row per direction: `copy_slots` of that many slots of all layers, on the device and, on a GPU, to and from
    pinned host memory."""
    shape = (layers, 2, 2 * slots, heads.num_kv_heads, heads.head_dim)
    store, other = (torch.zeros(shape, dtype=heads.dtype, device=place) for _ in range(2))
    order = torch.randperm(2 * slots)[:slots]
    pairs = torch.stack([order, order.flip(0)], dim=1).int().to(place)
    stores = [("on the device", store, other)]
    if place == "cuda":
        host = torch.zeros(shape, dtype=heads.dtype).pin_memory()
        stores += [("to the host", store, host), ("from the host", host, store)]
    num_bytes = layers * 2 * slots * heads.num_kv_heads * heads.head_dim * heads.dtype.itemsize
    rows = []
    for name, source, target in stores:
        median_s = statistics.median(timer(partial(copy_slots, device, source, target, pairs)))
        rows.append({"case": name, "us": median_s * 1e6, "gb_per_s": num_bytes / median_s / 1e9})
    return rows


def _systems(device: Device, batch: Batch, steps: Sequence[int]) -> list[tuple[str, Callable[[], None]]]:
    systems: list[tuple[str, Callable[[], None]]] = []
    for step in steps:
        _verify(f"step {step}", batch, decode(device, batch, step, num_sms=device.gpu.num_sms))
        systems.append((f"step {step}", _step(device, batch, step)))
    if batch.heads.is_fp8:
        return systems
    forward = Batch.draw(np.random.default_rng(0), batch.heads, batch.query_lens, batch.context_lens,
                         [False] * len(batch.context_lens)).to(batch.q.device.type)
    for cache in (forward.k, forward.v):
        cache.nan_to_num_()  # that slots of others may hold NaN is our contract, not theirs
    for name, call in peers(forward):
        _verify(name, forward, call())
        systems.append((name, _discarding(call)))
    return [*systems, ("torch SDPA, gathered", _sdpa(batch))]


def _step(device: Device, batch: Batch, step: int) -> Callable[[], None]:
    out = torch.empty_like(batch.q)
    return lambda: paged_attention(device, batch.q, batch.k, batch.v, *batch.integers(), out, step=step,
                                   k_scale=batch.k_scale, v_scale=batch.v_scale)


def _discarding(call: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: void(call())


def _verify(system: str, batch: Batch, out: Tensor) -> None:
    error, allowed = batch.error(out), TOLERANCE[batch.heads.dtype]
    if not error <= allowed:  # NaN too
        raise ArithmeticError(f"{system} is off by {error:.2g} in a row, {allowed} is allowed: a wrong kernel is not "
                              "timed")


def _sdpa(batch: Batch) -> Callable[[], None]:
    """torch's attention over dense K and V, padded to the longest: [S, K, longest, D] and a mask."""
    longest, h = max(batch.context_lens), batch.heads
    k = torch.zeros(len(batch.context_lens), h.num_kv_heads, longest, h.head_dim, dtype=h.dtype, device=batch.q.device)
    v, mask = torch.zeros_like(k), torch.zeros(len(k), 1, 1, longest, dtype=torch.bool, device=k.device)
    for s, length in enumerate(batch.context_lens):
        slots = batch.slots(s).to(k.device)
        k[s, :, :length] = batch.k.flatten(0, 1)[slots].transpose(0, 1)
        v[s, :, :length] = batch.v.flatten(0, 1)[slots].transpose(0, 1)
        mask[s, ..., :length] = True
    q = batch.q[:, :, None]  # [S, H, 1, D]
    return lambda: void(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


def void(_: Tensor) -> None:
    """The same call without its result."""


def _prefill(device: Device, batch: Batch) -> Callable[[], None]:
    out = torch.empty_like(batch.q)
    return lambda: prefill_attention(device, batch.q, batch.k, batch.v, *batch.integers(), batch.starts, out,
                                     k_scale=batch.k_scale, v_scale=batch.v_scale)


def _causal_sdpa(batch: Batch, case: PrefillCase) -> Callable[[], None]:
    """torch's causal attention over whole prompts of one length, dense: [S, heads, context, D]."""
    h = batch.heads
    q = batch.q.view(case.num_seqs, case.context, h.num_heads, h.head_dim).transpose(1, 2)
    slots = torch.stack([batch.slots(s) for s in range(case.num_seqs)]).to(batch.q.device)
    k, v = (cache.flatten(0, 1)[slots].transpose(1, 2) for cache in (batch.k, batch.v))
    return lambda: void(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
