"""The contract that kernels are held to: its batches hold the hard cases, and its measures see small defects."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.heads import Heads
from kernels_cupy.proof.contract import REVERSED, Batch, decode, prefill
from kernels_cupy.proof.emulator import Emulator

HALF, BFLOAT = torch.float16, torch.bfloat16
HEADS = Heads(4, 2, 64, 16, HALF)
LENGTHS = [1, 5, 15, 16, 17, 20, 30, 100, 33, 49]


def test_batches_put_two_owners_into_one_block_from_its_two_ends(rng):
    shared = 0
    for _ in range(20):
        batch = Batch.draw(rng, HEADS, [1] * len(LENGTHS), LENGTHS)
        count = Counter(block for blocks in batch.block_lists for block in blocks)
        assert max(count.values()) <= 2
        for block, owners in count.items():
            mine = batch.owner.view(-1, 16)[block]
            if owners == 2:
                shared += 1
                left, right = int(mine[0]), int(mine[-1])
                assert (int(batch.reversed[left]), left != right) == (0, True)
                assert int(batch.reversed[right]) != 0
                assert set(mine.tolist()) <= {left, right, -1}
        for seq, length in enumerate(LENGTHS):
            assert int((batch.owner == seq).sum()) == length, "no slot has two owners"
        assert bool(batch.k.flatten(0, 1)[batch.owner < 0].isnan().all())
    assert shared >= 10


def test_every_number_but_zero_is_drawn_as_a_direction(rng):
    seen = set()
    for _ in range(10):
        batch = Batch.draw(rng, HEADS, [1] * 4, [3, 4, 5, 6], [True, False, True, True])
        assert int(batch.reversed[1]) == 0
        seen |= set(batch.reversed[[0, 2, 3]].tolist())
        assert sorted(batch.reversed[[0, 2, 3]].tolist()) == sorted(REVERSED), "all of them in three sequences"
    assert seen == set(REVERSED)


@pytest.mark.parametrize("directions", [None, [False] * 5, [True] * 5])
def test_the_reference_is_a_softmax_over_each_sequence(rng, directions):
    batch = Batch.draw(rng, HEADS, [1, 3, 2, 16, 1], [1, 20, 17, 16, 40], directions)
    wanted, out = [], batch.reference()
    for s, (query, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        rows = batch.slots(s)
        for t in range(query):
            visible = rows[:context - query + t + 1]
            for head in range(4):
                k, v = (cache.flatten(0, 1)[visible, head // 2].double() for cache in (batch.k, batch.v))
                weights = (k @ batch.q[int(batch.starts[s]) + t, head].double() / 8).softmax(0)
                wanted.append(weights @ v)
    torch.testing.assert_close(out, torch.stack(wanted).view(out.shape), rtol=1e-12, atol=1e-12)


def test_a_wrong_row_is_seen_however_small_it_is(rng):
    batch = Batch.draw(rng, HEADS, [1, 1], [1, 2000])
    out = batch.reference()
    assert batch.error(out) == 0
    small = out.norm(dim=-1)
    assert small[1].max() < small[0].min() / 4, "the mean of 2,000 values is small beside a single one"
    out[1, 2] *= 1.002
    assert batch.error(out) == pytest.approx(0.002)
    with pytest.raises(AssertionError, match="of a row"):
        batch.check(out)
    out[0, 0, 0] = torch.nan
    with pytest.raises(AssertionError):
        batch.check(out)


@needs_emulator
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_equal_weights_give_the_mean_rounded_once(rng, dtype):
    lengths = [1, 15, 17, int(rng.integers(100, 300))]
    batch = Batch.draw(rng, Heads(4, 2, 64, 16, dtype), [1] * 4, lengths, steepness=0.0)
    for step in range(6):
        batch.check_rounding(decode(Emulator(), batch, step, 3 if step in (3, 4) else None, num_sms=1))
    several = Batch.draw(rng, Heads(4, 2, 64, 16, dtype), [1, 15, 4, 40], lengths, steepness=0.0)
    for fast in (True, False):
        several.check_rounding(prefill(Emulator(), several, fast))
    twice = (batch.reference() / 3).to(dtype).double() * 3
    with pytest.raises(AssertionError, match="half a unit"):
        batch.check_rounding(twice.to(dtype))
