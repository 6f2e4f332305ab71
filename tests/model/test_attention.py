"""One contract for every attention: plain numpy over the tokens a sequence may see, nothing read elsewhere.

Every slot that no sequence owns holds NaN, and real-time and best-effort sequences share their last blocks where
both tails fit, so reading one foreign slot shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from bros_ref.model.attention import (
    MAX_PADDING,
    AttentionMetadata,
    dense_attention,
    group_by_length,
    paged_attention,
)

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "paged": paged_attention, "dense": dense_attention, "dense-float64": partial(dense_attention, dtype=torch.float64)}


@dataclass
class Case:
    """Sequences as (query_len, context_len, reversed), in caches built from known logical K and V."""

    sequences: list[tuple[int, int, bool]]
    block_size: int
    kv_heads: int
    group: int
    head_dim: int
    seed: int
    window: int | None = None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.sampled_from([1, 2, 5, 16]))
    lengths = sorted({1, max(1, block_size - 1), block_size, block_size + 1, 3 * block_size + 2})
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        context = draw(st.sampled_from(lengths))
        query = draw(st.sampled_from([1, context, draw(st.integers(1, context))]))
        sequences.append((query, context, draw(st.booleans())))
    return Case(sequences, block_size, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 3])),
                draw(st.sampled_from([4, 8])), draw(st.integers(0, 2**16)),
                draw(st.none() | st.sampled_from([1, block_size, 2 * block_size + 1, 3 * block_size + 2])))


def place(case: Case, rng: np.random.Generator) -> list[list[int]]:
    """A scattered block table per sequence; the last block of one sequence is the next one's too when they run in
    opposite directions and both tails fit."""
    size = case.block_size
    free = list(rng.permutation(sum(-(-context // size) for _, context, _ in case.sequences) + 3))
    tables: list[list[int]] = []
    shareable: tuple[int, int, bool] | None = None  # block, slots used, direction
    for _, context, flip in case.sequences:
        table = [int(free.pop()) for _ in range(-(-context // size))]
        tail = context - (len(table) - 1) * size
        if shareable is not None and shareable[2] != flip and shareable[1] + tail <= size:
            table[-1], shareable = shareable[0], None
        else:
            shareable = table[-1], tail, flip
        tables.append(table)
    return tables


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, group: int, window: int | None) -> np.ndarray:
    """q [t, H, D] are the last t of the C positions of k, v [C, K, D]; float64."""
    out = np.empty_like(q)
    first = len(k) - len(q)
    for row in range(len(q)):
        for head in range(q.shape[1]):
            end = first + row + 1
            seen = slice(max(0, end - window) if window else 0, end)
            keys, values = k[seen, head // group], v[seen, head // group]
            scores = keys @ q[row, head] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values / weights.sum()
    return out


def build(case: Case) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata, np.ndarray]:
    rng = np.random.default_rng(case.seed)
    tables = place(case, rng)
    size, slot_shape = case.block_size, (case.kv_heads, case.head_dim)
    num_blocks = max(max(table) for table in tables) + 2
    caches = np.full((2, num_blocks * size, *slot_shape), np.nan)
    queries, expected = [], []
    for (query, context, flip), table in zip(case.sequences, tables, strict=True):
        q = rng.normal(size=(query, case.kv_heads * case.group, case.head_dim))
        k, v = rng.normal(size=(2, context, *slot_shape))
        for p in range(context):
            slot = table[p // size] * size + (size - 1 - p % size if flip else p % size)
            assert np.isnan(caches[0, slot]).all(), "the test placed two owners in one slot"
            caches[:, slot] = k[p], v[p]
        queries.append(q)
        expected.append(reference(q, k, v, case.group, case.window))
    query_lens, context_lens, flips = zip(*case.sequences, strict=True)
    meta = AttentionMetadata.build(tables, flips, query_lens, context_lens, size).within(case.window)
    k_cache, v_cache = torch.from_numpy(caches).float().unflatten(1, (num_blocks, size))
    return torch.from_numpy(np.concatenate(queries)).float(), k_cache, v_cache, meta, np.concatenate(expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@given(case=cases())
@example(Case([(1, 10, False), (1, 6, True)], 16, 1, 3, 8, 0))  # one block, two owners, every slot of it used
@example(Case([(7, 10, False), (3, 6, True), (1, 5, True)], 16, 2, 1, 8, 0))
@example(Case([(7, 10, False), (10, 10, True), (1, 9, True), (1, 3, False), (1, 4, True)], 4, 2, 1, 8, 0, window=4))
def test_every_attention_meets_the_contract(implementation: Callable[..., Tensor], case: Case) -> None:
    q, k_cache, v_cache, meta, expected = build(case)
    got = implementation(q, k_cache, v_cache, meta)
    assert got.dtype == q.dtype
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


def test_two_owners_of_one_block_do_share_it() -> None:
    """Guards the generator above: without sharing, the contract would prove less than it says."""
    tables = place(Case([(1, 10, False), (1, 6, True)], 16, 1, 3, 8, 0), np.random.default_rng(0))
    assert tables[0] == tables[1]


@given(case=cases())
def test_metadata_derives_positions_and_slots(case: Case) -> None:
    tables = place(case, np.random.default_rng(case.seed))
    query_lens, context_lens, flips = zip(*case.sequences, strict=True)
    meta = AttentionMetadata.build(tables, flips, query_lens, context_lens, case.block_size)
    positions, slots = [], []
    for (query, context, flip), table in zip(case.sequences, tables, strict=True):
        for p in range(context - query, context):
            offset = p % case.block_size
            positions.append(p)
            slots.append(table[p // case.block_size] * case.block_size
                         + (case.block_size - 1 - offset if flip else offset))
    assert meta.positions.tolist() == positions
    assert meta.slot_mapping.tolist() == slots
    assert [row[:len(table)] for row, table in zip(meta.block_tables.tolist(), tables, strict=True)] == tables


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), max_tokens=st.integers(1, 1000))
def test_decode_groups_hold_everyone_once_and_keep_their_bounds(lengths: list[int], max_tokens: int) -> None:
    groups = group_by_length(list(range(len(lengths))), lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest, shortest = max(lengths[i] for i in group), min(lengths[i] for i in group)
        assert longest <= MAX_PADDING * shortest
        assert len(group) == 1 or longest * len(group) <= max_tokens


def test_equal_lengths_share_a_group_up_to_the_limit() -> None:
    assert [len(group) for group in group_by_length(list(range(5)), [10] * 5, 20)] == [2, 2, 1]


@pytest.mark.parametrize(("arguments", "message"), [
    (([], [], [], []), "at least one sequence"),
    (([[0]], [False, True], [1], [1]), "one entry a sequence"),
    (([[0]], [False], [0], [1]), "1 <= query_len <= context_len, got 0 and 1"),
    (([[0]], [False], [3], [2]), "1 <= query_len <= context_len, got 3 and 2"),
    (([[0]], [False], [1], [5]), "1 blocks of 4 slots cannot hold 5 tokens"),
])
def test_bad_metadata_is_refused(arguments: tuple[list, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMetadata.build(*arguments, block_size=4)
