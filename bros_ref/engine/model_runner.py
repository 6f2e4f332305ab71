"""Turns a decision into tokens: copies, then one forward pass over prefills and decodes together, then sampling.

    SchedulerOutput -> run_copies -> token ids, AttentionMetadata -> model -> logits of the finished prompts and
    decodes -> token ids

It knows no policy and no deadline. A simulated runner can take its place, with the same `execute`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bros_ref.config import KVCacheConfig, ModelConfig
from bros_ref.engine.llm_engine import RequestsFailed
from bros_ref.engine.sampler import sample
from bros_ref.kv_cache.blocks import CopyPlan
from bros_ref.kv_cache.storage import KVStorage
from bros_ref.model.attention import AttentionMetadata
from bros_ref.request import Request
from bros_ref.scheduler.output import SchedulerOutput


class Model(Protocol):
    """What a runner asks of a model; `Decoder` and `ChecksumModel` are two."""

    config: ModelConfig

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, kv: KVStorage, meta: AttentionMetadata,
                logits_rows: torch.Tensor) -> torch.Tensor: ...


class NonFiniteLogits(RuntimeError):
    """The model gave a request logits with NaN or infinity: damaged weights, or an overflow of the number format."""

    def __init__(self, request: Request) -> None:
        super().__init__(f"request {request.request_id!r}: the model's logits after {request.num_tokens} tokens are "
                         "not finite, so there is no next token; check the weights, or use a wider dtype")


@dataclass(frozen=True)
class StepWork:
    """A decision as plain lists: everything needed to compute it, so that it can be sent to another process.

    Attributes:
        token_ids: [T] the new tokens of all sequences, one sequence after the other.
        block_tables, reversed, query_lens, context_lens: [S], as `AttentionMetadata.build` takes them.
        logits_rows: rows of T whose logits are wanted: the last row of each request that catches up with its known
            tokens.
        sampled: [len(logits_rows)] the places of those requests in the batch.
        copies: what to save, move and bring back before anything is written.
    """

    token_ids: list[int]
    block_tables: list[list[int]]
    reversed: list[bool]
    query_lens: list[int]
    context_lens: list[int]
    logits_rows: list[int]
    sampled: list[int]
    copies: CopyPlan

    @classmethod
    def of(cls, output: SchedulerOutput) -> StepWork:
        """Reads a decision, without changing it."""
        requests, counts = output.requests, output.num_scheduled_tokens
        token_ids: list[int] = []
        logits_rows: list[int] = []
        sampled: list[int] = []
        for index, (request, count) in enumerate(zip(requests, counts, strict=True)):
            token_ids += new_token_ids(request, count)
            if request.num_computed_tokens + count == request.num_tokens:
                logits_rows.append(len(token_ids) - 1)
                sampled.append(index)
        contexts = [request.num_computed_tokens + count for request, count in zip(requests, counts, strict=True)]
        return cls(token_ids, output.block_tables, [not request.is_rt for request in requests], counts, contexts,
                   logits_rows, sampled, output.kv_changes.copies)


class ModelRunner:
    """Runs a model on one device, with the KV storage it owns.

    Attributes:
        kv: the K/V tensors and the host checkpoint store.
        backend: what computes the model's attention, by the names of `model/backends.py`; said where speed is noted.
    """

    def __init__(self, model: Model, kv_config: KVCacheConfig, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, backend: str = "torch") -> None:
        self.model, self.backend = model, backend
        self.device = torch.device(device)
        config = model.config
        self.kv = KVStorage(config.num_layers, config.num_kv_heads, config.head_dim, kv_config, dtype, self.device)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[int | None]:
        """Computes one step. Returns [num_requests]: the sampled token, or None where the prompt is not done yet.

        Raises:
            RequestsFailed: logits of some requests are not finite, so no token can be drawn from them.
        """
        requests, work = output.requests, StepWork.of(output)
        logits = self.compute(work)
        sampled = work.sampled
        if not sampled and self.device.type == "cuda":  # nothing is read back, so nothing else waits for the GPU
            torch.cuda.current_stream(self.device).record_event().synchronize()
        result: list[int | None] = [None] * len(requests)
        errors: dict[int, Exception] = {}
        finite = logits.sum(dim=-1, dtype=torch.float32).isfinite().tolist()  # one NaN or infinity spoils the sum
        if not all(finite):
            errors = {index: NonFiniteLogits(requests[index])
                      for index, is_finite in zip(sampled, finite, strict=True) if not is_finite}
            sampled = [index for index in sampled if index not in errors]
            logits = logits[torch.tensor(finite, device=logits.device)]
        for index, token_id in zip(sampled, sample(logits, [requests[i] for i in sampled]), strict=True):
            result[index] = token_id
        if errors:
            raise RequestsFailed(result, errors)
        return result

    @torch.inference_mode()
    def compute(self, work: StepWork) -> torch.Tensor:
        """Copies, then one forward pass. Returns float32 logits, [len(work.logits_rows), V]."""
        # 1. The order matters: what is about to be overwritten is saved before anything is written.
        copies = work.copies
        if copies:
            self.kv.run_copies(copies.checkpoint, copies.relocate, copies.restore)

        # 2. Where K and V of every row go, and what each row may see.
        meta = AttentionMetadata.build(work.block_tables, work.reversed, work.query_lens, work.context_lens,
                                       self.kv.config.block_size, self.device)
        return self.model.forward(self._tensor(work.token_ids), meta.positions, self.kv, meta,
                                  self._tensor(work.logits_rows))

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)


def new_token_ids(request: Request, count: int) -> Sequence[int]:
    """The tokens that a step computes: known tokens [num_computed, num_computed + count)."""
    start, prompt = request.num_computed_tokens, request.num_prompt_tokens
    if start >= prompt:
        return request.output_token_ids[start - prompt:start - prompt + count]
    return request.token_ids[start:start + count] if start + count > prompt else (
        request.prompt_token_ids[start:start + count])
