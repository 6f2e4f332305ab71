"""The cost model's all-reduce against published measurements: NCCL called from PyTorch on DGX A100 and H100.

Source: microsoft/vidur (MIT), commit 7d47513, data/profiling/network/{a100,h100}_dgx/all_reduce.csv: medians of rows
whose GPUs are all in one machine. What they show: for large messages the assumed share of the link's rate is in the
middle of what was measured; for small ones the assumed latency is that of a custom kernel in a CUDA graph, and NCCL
launched from PyTorch takes two to four times as long. docs/results.md says what that means for a step.
"""

import itertools
import statistics

import pytest

from bros_ref.simulator.cost_model import CostModel, gpu_named, model_named
from bros_ref.simulator.gpus import ALL_REDUCE_LATENCY_S

MEASURED_US = {  # (GPU, number of GPUs) -> bytes of the message -> microseconds
    ("a100-80gb", 2): {264_192: 27, 1 << 20: 47, 1 << 22: 63, 1 << 24: 139, 1 << 26: 430},
    ("a100-80gb", 4): {264_192: 62, 1 << 20: 64, 1 << 22: 85, 1 << 24: 200, 1 << 26: 603},
    ("a100-80gb", 8): {264_192: 32, 1 << 20: 64, 1 << 22: 99, 1 << 24: 274, 1 << 26: 675},
    ("h100-80gb", 2): {264_192: 41, 1 << 20: 43, 1 << 22: 43, 1 << 24: 73, 1 << 26: 245},
    ("h100-80gb", 4): {264_192: 42, 1 << 20: 41, 1 << 22: 47, 1 << 24: 93, 1 << 26: 318},
    ("h100-80gb", 8): {264_192: 39, 1 << 20: 34, 1 << 22: 51, 1 << 24: 115, 1 << 26: 322},
}


def modelled_us(gpu, tp, num_bytes):
    """One all-reduce of the cost model, which counts two per layer, of fp16 activations."""
    cost = CostModel(gpu_named(gpu), model_named("llama-3-8b"), tp)
    num_tokens = num_bytes / (2 * cost.model.hidden_size)
    return 1e6 * (ALL_REDUCE_LATENCY_S + cost._reduce_token_s / 2 * num_tokens)


def test_the_rate_of_large_messages():
    """Bytes per second between 16 and 64 MiB, where only the link counts: off by a third at most, in the mean right."""
    ratios = []
    for (gpu, tp), measured in MEASURED_US.items():
        modelled = modelled_us(gpu, tp, 1 << 26) - modelled_us(gpu, tp, 1 << 24)
        ratios.append((measured[1 << 26] - measured[1 << 24]) / modelled)
    assert all(2 / 3 < ratio < 4 / 3 for ratio in ratios), ratios
    assert statistics.mean(ratios) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("setting", "num_bytes"), [
    *itertools.product(MEASURED_US, (264_192, 1 << 20, 1 << 22, 1 << 24))])
def test_small_messages_are_those_of_a_faster_kernel_than_nccl(setting, num_bytes):
    """Never slower than measured, never more than five times as fast; a wrong unit would be a factor of eight."""
    assert MEASURED_US[setting][num_bytes] / 5 < modelled_us(*setting, num_bytes) < MEASURED_US[setting][num_bytes]
