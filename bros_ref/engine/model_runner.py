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
    def of(cls, output: SchedulerOutput, decodes_first: bool = False) -> StepWork:
        """Reads a decision, without changing it. `decodes_first` puts sequences with one new token before the others,
        as the GPU's kernels require; otherwise they are in the batch's order."""
        requests, counts, order = output.requests, output.num_scheduled_tokens, list(range(len(output.requests)))
        if decodes_first:
            order.sort(key=lambda index: counts[index] > 1)
        token_ids: list[int] = []
        logits_rows: list[int] = []
        sampled: list[int] = []
        for index in order:
            request, count = requests[index], counts[index]
            token_ids += new_token_ids(request, count)
            if request.num_computed_tokens + count == request.num_tokens:
                logits_rows.append(len(token_ids) - 1)
                sampled.append(index)
        contexts = [requests[index].num_computed_tokens + counts[index] for index in order]
        return cls(token_ids, [output.block_tables[index] for index in order],
                   [not requests[index].is_rt for index in order], [counts[index] for index in order], contexts,
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
        self.kv = self.make_storage(model.config, kv_config, dtype)

    def make_storage(self, config: ModelConfig, kv_config: KVCacheConfig, dtype: torch.dtype) -> KVStorage:
        """The K/V tensors of this runner."""
        return KVStorage(config.num_layers, config.num_kv_heads, config.head_dim, kv_config, dtype, self.device)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[int | None]:
        """Computes one step. Returns [num_requests]: the sampled token, or None where the prompt is not done yet.

        Raises:
            RequestsFailed: logits of some requests are not finite, so no token can be drawn from them.
        """
        work = StepWork.of(output, decodes_first=self.backend != "torch")
        token_ids = self.next_tokens(work, [output.requests[index] for index in work.sampled])
        result: list[int | None] = [None] * len(output.requests)
        for index, token_id in zip(work.sampled, token_ids, strict=True):
            result[index] = token_id
        if errors := {index: NonFiniteLogits(output.requests[index]) for index in work.sampled
                      if result[index] is None}:
            raise RequestsFailed(result, errors)
        return result

    def next_tokens(self, work: StepWork, requests: Sequence[Request]) -> list[int | None]:
        """Computes a step and the next token of each of `work.sampled`; None if its logits are not finite."""
        logits = self.compute(work)
        if not requests:
            self.wait()  # no result is read back, so nothing else would wait
        return self.sample(logits, requests)

    def wait(self) -> None:
        """Returns when the device has finished. Otherwise the step would be timed only up to its launch."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).record_event().synchronize()

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[int | None]:
        """logits [num_rows, V], one row per request -> the next tokens; None if its logits are not finite."""
        finite = logits.sum(dim=-1, dtype=torch.float32).isfinite().tolist()  # one NaN or infinity spoils the sum
        if not all(finite):
            logits = logits[torch.tensor(finite, device=logits.device)]
            requests = [request for request, is_finite in zip(requests, finite, strict=True) if is_finite]
        token_ids = iter(sample(logits, requests))
        return [next(token_ids) if is_finite else None for is_finite in finite]

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
