"""`KernelAttention`: the tables it hands to the kernels are those of the step it is called for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from bros_ref.model.attention import AttentionMetadata, dense_attention
from bros_ref.model.backends import KernelAttention
from kernels_cupy.heads import Heads
from kernels_cupy.proof.contract import Batch
from kernels_cupy.proof.emulator import Emulator

pytestmark = needs_emulator
HEADS = Heads(4, 2, 64, 16, torch.float16)


def metadata(batch: Batch) -> AttentionMetadata:
    return AttentionMetadata.build(batch.block_lists, batch.reversed.bool().tolist(), batch.query_lens,
                                   batch.context_lens, HEADS.block_size)


@pytest.mark.parametrize("queries", [[1, 1], [3, 7], [1, 5], [5, 1]], ids=["decode", "prefill", "mixed", "decode last"])
def test_metadata_of_an_earlier_step_is_never_used(rng: np.random.Generator, queries: list[int]) -> None:
    """Each step's metadata is freed before the next is made, which may then have the same address."""
    attention = KernelAttention(Emulator())
    for _ in range(6):
        lengths = [int(rng.integers(7, 40)), int(rng.integers(7, 40))]
        batch = Batch.draw(rng, HEADS, queries, lengths)
        meta = metadata(batch)
        for _ in range(2):  # as two layers of a model
            batch.check(attention(batch.q, batch.k, batch.v, meta))
        del meta


def test_two_steps_may_take_turns(rng: np.random.Generator) -> None:
    attention = KernelAttention(Emulator())
    batches = [Batch.draw(rng, HEADS, [1, 2], [20, 33]) for _ in range(2)]
    metas = [metadata(batch) for batch in batches]
    for i in (0, 1, 0):
        out = attention(batches[i].q, batches[i].k, batches[i].v, metas[i])
        wanted = dense_attention(batches[i].q.double(), batches[i].k.double(), batches[i].v.double(), metas[i],
                                 torch.float64)
        torch.testing.assert_close(out.double(), wanted, rtol=5e-3, atol=5e-3)
