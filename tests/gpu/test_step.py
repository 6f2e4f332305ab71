"""A step's integers arrive as they were packed, in buffers that fit, with padding that does no harm."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bros_ref.config import KVCacheConfig
from bros_ref.engine.model_runner import StepWork
from bros_ref.engine.profile import _batch_output
from bros_ref.gpu.step import MIN_WIDTH, PADDING_SLOT, PackedStep, StepShape
from bros_ref.kv_cache.blocks import CopyPlan
from bros_ref.model.attention import AttentionMetadata

CPU = torch.device("cpu")


def work_of(queries, contexts, rng, wanted=None, block_size=16):
    tables = [rng.integers(0, 1000, -(-context // block_size)).tolist() for context in contexts]
    ends = (np.cumsum(queries) - 1).tolist()
    rows = ends if wanted is None else [ends[i] for i in wanted]
    return StepWork(rng.integers(0, 99, sum(queries)).tolist(), tables, [bool(rng.integers(2)) for _ in queries],
                    queries, contexts, rows, list(range(len(rows))), CopyPlan())


@pytest.mark.parametrize(("queries", "contexts", "wanted"), [
    ([1], [1], None), ([1] * 3, [16, 17, 300], [0, 2]), ([1] * 4, [1, 2, 3, 4], None), ([1] * 5, [9] * 5, []),
    ([1, 1, 5], [30, 2, 5], None), ([4, 2], [4, 40], [1]), ([7], [7], [])])
def test_what_is_uploaded_is_what_the_metadata_says(rng, queries, contexts, wanted):
    work = work_of(queries, contexts, rng, wanted)
    shape = StepShape.of(work)
    step = PackedStep(shape, 16, CPU)
    step.upload(work_of(queries, contexts, rng, wanted))  # of an earlier step nothing may be left
    draws = [(0.5, 0.9, 0.25 * i) for i in range(len(work.logits_rows))]
    step.upload(work, draws)
    meta = AttentionMetadata.build(work.block_tables, work.reversed, queries, contexts, 16)
    tokens, seqs, width = sum(queries), len(queries), meta.block_tables.shape[1]
    assert step.token_ids[:tokens].tolist() == work.token_ids
    assert step.positions[:tokens].tolist() == meta.positions.tolist()
    assert step.slots.tolist() == meta.slot_mapping.tolist() + [PADDING_SLOT] * (shape.tokens - tokens)
    assert step.tables[:seqs, :width].tolist() == meta.block_tables.tolist()
    assert step.context_lens.tolist() == contexts + [0] * (len(step.context_lens) - seqs)
    assert step.reversed[:seqs].bool().tolist() == work.reversed
    for i, (temperature, top_p, uniform) in enumerate(draws):
        row = work.logits_rows[i] if shape.is_bucket else i
        assert step.draws[:, row].tolist() == pytest.approx([temperature, top_p, uniform])
    decodes = sum(length == 1 for length in queries)
    if shape.num_prefills:
        assert step.query_starts.tolist() == [0, *np.cumsum(queries[decodes:])]
        assert [len(part) for part in step.prefills] == [seqs - decodes] * 3
        assert step.logits_rows.tolist() == work.logits_rows
    for part in step.decodes:
        assert len(part) == shape.num_decodes


@pytest.mark.parametrize(("seqs", "blocks", "rows", "width"), [
    (1, 1, 1, MIN_WIDTH), (2, MIN_WIDTH, 2, MIN_WIDTH), (3, MIN_WIDTH + 1, 4, 2 * MIN_WIDTH), (4, 1, 4, MIN_WIDTH),
    (5, 100, 8, 128)])
def test_decode_steps_are_rounded_up_to_buckets(rng, seqs, blocks, rows, width):
    shape = StepShape.of(work_of([1] * seqs, [16 * blocks] * seqs, rng))
    assert (shape.tokens, shape.width, shape.num_logits, shape.is_bucket) == (rows, width, rows, True)


def test_sequences_with_one_token_must_come_first(rng):
    with pytest.raises(ValueError, match="must come first"):
        StepShape.of(work_of([3, 1], [3, 9], rng))
    output = _batch_output([(3, 0), (1, 8), (2, 5), (1, 3)], KVCacheConfig(16, 16, 0))
    work = StepWork.of(output, decodes_first=True)
    assert StepShape.of(work).num_decodes == 2
    assert work.query_lens == [1, 1, 3, 2]
    assert work.context_lens == [9, 4, 3, 7]
    assert work.sampled == [1, 3, 0, 2], "places in the batch"
    assert work.logits_rows == [0, 1, 4, 6]
    assert [work.block_tables[0], work.block_tables[2]] == [output.block_tables[1], output.block_tables[0]]
    assert StepWork.of(output).query_lens == [3, 1, 2, 1], "else the batch's order stays"


def test_a_buffer_that_is_still_being_read_is_not_overwritten(rng):
    """After an interrupted step the copy to the GPU may still wait in its stream."""
    work, seen = work_of([1, 1], [3, 4], rng), []
    step = PackedStep(StepShape.of(work), 16, CPU)
    step.upload(work)
    before = step._numbers.copy()
    step._sent = SimpleNamespace(synchronize=lambda: seen.append(step._numbers.copy()))
    step.upload(work_of([1, 1], [7, 9], rng))
    assert [part.tolist() for part in seen] == [before.tolist()]
    assert step._numbers.tolist() != before.tolist()
