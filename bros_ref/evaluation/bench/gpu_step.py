"""The operations of a decode step, counted without a GPU; an estimate of its time; and its measured time on a GPU.

Kernels, uploads, waits and allocations of the engine's own code are counted exactly, on tensors that have shapes but no
memory. The time of the step is an estimate, and labelled as such: the counts times published or assumed rates. On a
machine with a GPU, `tools/gpu_day.py` measures the same steps by the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bros_ref.config import KVCacheConfig, ModelConfig
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.engine.profile import _batch_output
from bros_ref.gpu.attention import KernelAttention
from bros_ref.gpu.decoder import KernelDecoder, why_not_fused
from bros_ref.gpu.runner import KernelRunner
from bros_ref.model.decoder import Decoder
from bros_ref.model.weights.parameters import Parameters, parameter_shapes
from bros_ref.simulator.cost_model import gpu_named, model_named
from kernels_cupy.device import Device
from kernels_cupy.proof.recording import Recorder

POOL = KVCacheConfig(4096, 16, 0)
PATHS = ("attention only", "fused", "fused, graph")  # what our kernels compute; as a graph, or launch by launch


def meta_runner(config: ModelConfig, dtype: torch.dtype, recorder: Recorder, pool: KVCacheConfig = POOL,
                fused: bool = True) -> ModelRunner:
    """A runner whose tensors have no memory, with the kernels of `recorder`. `fused=False` uses the readable decoder
    with our kernels for attention only."""
    weights = {name: torch.empty(shape, dtype=dtype, device="meta")
               for name, shape in parameter_shapes(config).items()}
    fused = fused and why_not_fused(config, dtype) is None
    return _runner(PATHS[1] if fused else PATHS[0], config, weights, recorder, pool)


def _runner(path: str, config: ModelConfig, weights: Parameters, kernels: Device, pool: KVCacheConfig) -> ModelRunner:
    """The runner of one of PATHS, on the device of the weights."""
    some = weights["embed.weight"]
    attention, device, dtype = KernelAttention(kernels), some.device, some.dtype
    if path == PATHS[0]:
        return ModelRunner(Decoder(config, weights, dtype, device, attention), pool, device, dtype, "cupy")
    model = KernelDecoder(config, weights, dtype, device, attention)
    return KernelRunner(model, pool, device, dtype, "cupy", None if path == PATHS[2] else _launch_by_launch)


def _launch_by_launch(body: Callable[[], object]) -> Callable[[], object]:
    """Used instead of a capture: runs the body now and on every replay."""
    body()
    return body


def counted_step(runner: ModelRunner, recorder: Recorder, batch: Sequence[tuple[int, int]]) -> None:
    """Counts one step of sequences with (new tokens, tokens in the cache), after an equal step that warms up."""
    output = _batch_output(batch, runner.kv.config)
    with recorder:
        runner.execute(output)
        recorder.clear()
        runner.execute(output)


# ----- the estimated time

# Our assumptions: we measured none of these on the GPUs.
LAUNCH_S = 6e-6  # host: one kernel launched from Python
GAP_S = 1e-6  # device: from one kernel of a graph to the next
GRAPH_S = 10e-6  # host: one graph launched
CROSSING_S = 10e-6  # one copy between host and device, besides its bytes; or one wait
PACKING_S = 100e-6  # host: scheduling the step and packing its integers


@dataclass(frozen=True)
class StepEstimate:
    """A decode step: its counts and its estimated time.

    Attributes:
        path: one of PATHS.
        kernels, uploads, waits, allocations: counted; replaying a graph allocates nothing beyond these.
        upload_bytes: counted.
        host_ms: the host's work until everything is launched; device_ms: the GPU's work.
        estimated_ms: the longer of both, or with a graph their sum, plus copies and waits.
        roofline_ms: reading weights, K and V of all contexts at the data sheet's bandwidth; a lower bound.
    """

    gpu: str
    model: str
    batch: int
    context: int
    path: str
    kernels: int
    uploads: int
    upload_bytes: int
    waits: int
    allocations: int
    host_ms: float
    device_ms: float
    estimated_ms: float
    roofline_ms: float


def count_paths(config: ModelConfig, batch: int, context: int,
                dtype: torch.dtype = torch.bfloat16) -> dict[str, Recorder]:
    """path -> the counts of one decode step of `batch` sequences with `context` tokens each."""
    found = {}
    for path in PATHS[:2]:
        found[path] = Recorder()
        pool = KVCacheConfig(max(POOL.num_blocks, batch * (context // POOL.block_size + 1)), POOL.block_size, 0)
        counted_step(meta_runner(config, dtype, found[path], pool, fused=path != PATHS[0]), found[path],
                     [(1, context - 1)] * batch)
    return found | {PATHS[2]: found[PATHS[1]]}


def llama_config(model: str, context: int) -> ModelConfig:
    """The simulator's model of that name, with room for at least `context` tokens."""
    shape = model_named(model)
    return ModelConfig("llama", shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_layers,
                       shape.num_heads, shape.num_kv_heads, shape.head_dim, max(shape.max_context_tokens, context))


def timed_steps(kernels: Device, weights: Parameters, config: ModelConfig, batches: Sequence[int], context: int,
                clock: Callable[[], float] = time.perf_counter, repeats: int = 20) -> list[dict[str, Any]]:
    """Measures the decode steps of `estimate_steps`: one row per batch and path, with the median of `repeats` steps
    after two that load kernels and capture graphs. A step ends when its tokens are on the host."""
    rows = []
    for batch in batches:
        pool = KVCacheConfig(batch * (context // POOL.block_size + 1), POOL.block_size, 0)
        output = _batch_output([(1, context - 1)] * batch, pool)
        for path in PATHS:
            runner, times_s = _runner(path, config, weights, kernels, pool), []
            for _ in range(2 + repeats):
                start_s = clock()
                runner.execute(output)
                times_s.append(clock() - start_s)
            rows.append({"path": path, "layers": config.num_layers, "batch": batch, "context": context,
                         "ms": 1e3 * statistics.median(times_s[2:])})
    return rows


def estimate_steps(model: str = "llama-3-8b", gpus: Sequence[str] = ("h100-80gb", "a100-80gb"),
                   batches: Sequence[int] = (1, 32), context: int = 1024) -> list[StepEstimate]:
    """One row per GPU, batch and path. Raises ValueError: unknown GPU or model, or not a Llama-like model."""
    shape, rows, config = model_named(model), [], llama_config(model, context)
    if shape.mlp_matrices != 3:
        raise ValueError(f"{model} has no gated MLP: the fused kernels compute models of Llama's kind")
    for name in gpus:
        gpu_named(name)
    counts = {batch: count_paths(config, batch, context) for batch in batches}
    for name in gpus:
        for batch in batches:
            rows += [_estimate(name, model, batch, context, path, recorder)
                     for path, recorder in counts[batch].items()]
    return rows


def _estimate(name: str, model: str, batch: int, context: int, path: str, counted: Recorder) -> StepEstimate:
    gpu, shape = gpu_named(name), model_named(model)
    read = 2 * (shape.parameters - (shape.embeddings - 1) * shape.vocab_size * shape.hidden_size)  # of 2 bytes each
    cached = batch * context * shape.kv_bytes_per_token
    kernels = len(counted.kernels)
    memory_s = (read / gpu.efficiency.weight_read_share + cached / gpu.efficiency.decode_read_share) \
        / gpu.memory_bytes_per_s
    device_s = memory_s + kernels * GAP_S
    crossings_s = CROSSING_S * (len(counted.uploads) + len(counted.waits)) + sum(counted.uploads) / gpu.host_bytes_per_s
    if path == PATHS[2]:
        host_s = PACKING_S + GRAPH_S
        total_s = host_s + device_s + crossings_s
    else:
        host_s = PACKING_S + kernels * LAUNCH_S
        total_s = max(host_s, PACKING_S + device_s) + crossings_s
    return StepEstimate(name, model, batch, context, path, kernels, len(counted.uploads), sum(counted.uploads),
                        len(counted.waits), len(counted.allocations), 1e3 * host_s, 1e3 * device_s, 1e3 * total_s,
                        1e3 * (read + cached) / gpu.memory_bytes_per_s)


def markdown(rows: Sequence[StepEstimate]) -> str:
    """The section of docs/gpu.md."""
    lines = ["| GPU | batch | path | kernels | uploads | waits | allocations | estimated ms | roofline ms |",
             "|" + "---|" * 9]
    lines += [f"| {row.gpu} | {row.batch} | {row.path} | {row.kernels} | {row.uploads} | {row.waits} | "
              f"{row.allocations} | {row.estimated_ms:.1f} | {row.roofline_ms:.1f} |" for row in rows]
    return (f"""## A decode step, counted and estimated

`bros-ref bench gpu-step` prints this table. The model is {rows[0].model} in bf16, and each sequence has
{rows[0].context:,} tokens of context. Kernels, uploads, waits and allocations are **counted** by running the engine's
own code on tensors without memory. Times are an **estimate**, not a measurement. The estimate assumes that weights, K
and V are read at the fractions of peak bandwidth that the simulator's fits give (`bros_ref/simulator/gpus.py`). It adds
overheads, which are assumptions: {1e6 * LAUNCH_S:g} us of host time per launch, {1e6 * GAP_S:g} us between two kernels,
{1e6 * CROSSING_S:g} us per copy or wait, and {1e6 * PACKING_S:g} us to schedule and pack a step. The roofline divides
the bytes read by the bandwidth in the data sheet. *Attention only* is the readable decoder, with our kernels for
attention only; *fused* is `bros_ref/gpu/`, run launch by launch or as a CUDA graph.

""" + "\n".join(lines) + "\n")
