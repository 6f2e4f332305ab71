"""What a decode step asks of a GPU, counted without one; and a model of the time that would take.

Counted, exactly: kernels, uploads, waits and allocations of the engine's own code, on tensors that have shapes and no
memory. Estimated, and labelled so: the step's time, as the sum of what is counted times published or assumed rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bros_ref.config import KVCacheConfig, ModelConfig
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.engine.profile import _batch_output
from bros_ref.gpu.decoder import KernelDecoder, why_not_fused
from bros_ref.gpu.runner import KernelRunner
from bros_ref.model.backends import KernelAttention
from bros_ref.model.decoder import Decoder
from bros_ref.model.weights.parameters import parameter_shapes
from kernels_cupy.proof.recording import Recorder

POOL = KVCacheConfig(4096, 16, 0)


def meta_runner(config: ModelConfig, dtype: torch.dtype, recorder: Recorder, pool: KVCacheConfig = POOL,
                fused: bool = True) -> ModelRunner:
    """A runner whose tensors have no memory, with the kernels of `recorder`. `fused=False`: the readable decoder with
    kernels for attention alone."""
    weights = {name: torch.empty(shape, dtype=dtype, device="meta")
               for name, shape in parameter_shapes(config).items()}
    attention, device = KernelAttention(recorder), torch.device("meta")
    if fused and why_not_fused(config, dtype) is None:
        model = KernelDecoder(config, weights, dtype, device, attention)
        return KernelRunner(model, pool, device, dtype, "cupy")
    return ModelRunner(Decoder(config, weights, dtype, device, attention), pool, device, dtype, "cupy")


def counted_step(runner: ModelRunner, recorder: Recorder, batch: Sequence[tuple[int, int]]) -> None:
    """Counts one step of sequences with (new tokens, tokens in the cache), after one that fills the caches."""
    output = _batch_output(batch, runner.kv.config)
    with recorder:
        runner.execute(output)
        recorder.clear()
        runner.execute(output)
