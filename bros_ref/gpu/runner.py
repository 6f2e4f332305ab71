"""`ModelRunner` for a `KernelDecoder`: one upload and one wait per step, decode steps as CUDA graphs.

    copies queued -> integers packed and uploaded -> forward pass (or its graph) -> tokens drawn -> one copy to the host
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bros_ref.config import KVCacheConfig, ModelConfig
from bros_ref.engine.model_runner import ModelRunner, StepWork
from bros_ref.gpu.copies import KernelKVStorage, Streams
from bros_ref.gpu.decoder import Activations, KernelDecoder
from bros_ref.gpu.graphs import Capture, CudaCapture, Graphs
from bros_ref.gpu.sampler import NOT_FINITE, draw_of, needs_history, sample_rows
from bros_ref.gpu.step import Draw, PackedStep, StepShape
from bros_ref.request import Request


class KernelRunner(ModelRunner):
    """Runs a `KernelDecoder` and owns its buffers. Buffers of decode steps are kept, one set per bucket.

    Args:
        capture: makes graphs of decode steps. By default CUDA graphs on a GPU, and no graphs elsewhere.
        streams: see `KernelKVStorage`.
    """

    model: KernelDecoder
    kv: KernelKVStorage

    def __init__(self, model: KernelDecoder, kv_config: KVCacheConfig, device: torch.device | str, dtype: torch.dtype,
                 backend: str, capture: Capture | None = None, streams: Streams | None = None) -> None:
        self._streams = streams
        super().__init__(model, kv_config, device, dtype, backend)
        if capture is None and self.device.type == "cuda":
            capture = CudaCapture(self.device)
        self._graphs = None if capture is None else Graphs(capture)
        self._activations: dict[int, Activations] = {}  # of decode steps, by number of rows
        self._buckets: dict[StepShape, tuple[PackedStep, torch.Tensor]] = {}  # integers, and the kernel's workspace

    def make_storage(self, config: ModelConfig, kv_config: KVCacheConfig, dtype: torch.dtype) -> KernelKVStorage:
        """See `ModelRunner`."""
        return KernelKVStorage(config.num_layers, config.num_kv_heads, config.head_dim, kv_config, dtype, self.device,
                               self.model.kernels, self._streams)

    @torch.inference_mode()
    def compute(self, work: StepWork) -> torch.Tensor:
        """See `ModelRunner.compute`."""
        step, logits = self._forward(work, ())
        return logits[work.logits_rows].float() if step.shape.is_bucket else logits.float()

    def next_tokens(self, work: StepWork, requests: Sequence[Request]) -> list[int | None]:
        """See `ModelRunner.next_tokens`. Waits once, for the copy of the tokens."""
        draws = [draw_of(request) for request in requests]
        step, logits = self._forward(work, draws)
        if not requests:
            self.wait()
            return []
        rows = work.logits_rows if step.shape.is_bucket else range(len(requests))
        if any(needs_history(request) for request in requests):
            return self.sample(logits[list(rows)], requests)
        tokens = sample_rows(logits, step.draws, draws).tolist()
        return [None if tokens[row] == NOT_FINITE else tokens[row] for row in rows]

    def _forward(self, work: StepWork, draws: Sequence[Draw]) -> tuple[PackedStep, torch.Tensor]:
        """Queues the copies, the upload and the forward pass. The logits have the rows of the `PackedStep`."""
        if work.copies:
            self.kv.run_copies(work.copies.checkpoint, work.copies.relocate, work.copies.restore)
        shape = StepShape.of(work)
        step, activations, workspace = self._buffers(shape)
        step.upload(work, draws)

        def forward() -> None:
            self.model.forward_step(step, activations, workspace, self.kv)

        if self._graphs is not None and shape.is_bucket:
            self.kv.wait_for_restores()  # a graph cannot wait for events of this step
            self._graphs.run(shape, forward)
        else:
            forward()
        return step, activations.logits

    def _buffers(self, shape: StepShape) -> tuple[PackedStep, Activations, torch.Tensor]:
        """The buffers of the step's bucket, or new ones for a step without a bucket."""
        block_size = self.kv.config.block_size
        if not shape.is_bucket:
            return (PackedStep(shape, block_size, self.device), self.model.activations(shape),
                    self.model.workspace(shape, self.kv))
        if shape.tokens not in self._activations:
            self._activations[shape.tokens] = self.model.activations(shape)
        if shape not in self._buckets:
            self._buckets[shape] = (PackedStep(shape, block_size, self.device),
                                    self.model.workspace(shape, self.kv))
        step, workspace = self._buckets[shape]
        return step, self._activations[shape.tokens], workspace
