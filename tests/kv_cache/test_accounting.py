"""The KV accounts under random lives, against a slot-by-slot shadow memory, and the paper's moves one by one."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import ShadowMemory, make_request, random_life

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.bidirectional import BidirectionalKVCacheManager
from bros_ref.kv_cache.blocks import ON_HOST, CacheIntegrityError
from bros_ref.kv_cache.manager import KVCacheManager

UNITS = ("slot", "block", "request")


def bidirectional(num_blocks, block_size, unit="slot", num_host_blocks=None):
    return BidirectionalKVCacheManager(KVCacheConfig(num_blocks, block_size, num_host_blocks), unit)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), unit=st.sampled_from(UNITS), block_size=st.sampled_from([1, 2, 3, 4, 16]),
       num_blocks=st.integers(1, 12), num_host_blocks=st.sampled_from([None, 0, 1, 3]))
def test_no_token_is_ever_lost_stale_or_foreign(seed, unit, block_size, num_blocks, num_host_blocks):
    manager = bidirectional(num_blocks, block_size, unit, num_host_blocks)
    random_life(manager, random.Random(seed), steps=60, largest=2 * block_size + 1)
    assert manager.host.num_unused == manager.host.num_blocks


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), block_size=st.sampled_from([1, 2, 16]), num_blocks=st.integers(1, 12))
def test_the_paged_baseline_keeps_every_token(seed, block_size, num_blocks):
    seen = random_life(KVCacheManager(KVCacheConfig(num_blocks, block_size)), random.Random(seed), 60, 2 * block_size)
    assert seen["checkpoint"] == seen["shared"] == 0


def test_the_random_lives_reach_every_move():
    total = Counter()
    for seed in range(60):
        total.update(random_life(bidirectional(8, 4, UNITS[seed % 3]), random.Random(seed), 60, 9))
    assert min(total.values()) > 0, f"never happened: {[kind for kind, count in total.items() if not count]}"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_a_request_gets_as_many_blocks_as_its_tokens_fill(length):
    manager = KVCacheManager(KVCacheConfig(4, 16))
    table = manager.allocate_slots(make_request("a", False), length)
    assert len(table) == -(-length // 16) == manager.num_used_blocks


def test_lookahead_reserves_so_that_later_growth_cannot_fail():
    manager = KVCacheManager(KVCacheConfig(4, 4))
    first, second = make_request("first", False), make_request("second", False)
    assert len(manager.allocate_slots(first, 3, lookahead_tokens=9)) == 3
    assert manager.allocate_slots(second, 5) is None
    assert manager.allocate_slots(first, 9) is not None
    manager.check_integrity()


# The paper's moves, one at a time, in blocks of 4 slots. A step: begin, allocate, then let the shadow run it.


def pending_be(num_tokens, num_blocks=2, unit="slot"):
    """A manager whose pool a best-effort request of `num_tokens` has filled, and which now sits out."""
    manager = bidirectional(num_blocks, 4, unit)
    memory, be = ShadowMemory(manager), make_request("be", False)
    manager.begin_step()
    assert manager.allocate_slots(be, num_tokens) is not None
    memory.run_step([(be, num_tokens)])
    manager.begin_step([be])
    return manager, memory, be


def test_sharing_free_middle_slots_copies_nothing():
    manager, memory, _be = pending_be(6)  # B0..B3 | B4 B5 _ _
    rt = make_request("rt", True)
    assert manager.allocate_slots(rt, 2) == [manager.block_table("be")[1]]
    assert not manager._changes.copies
    memory.run_step([(rt, 2)])
    assert [view.state for view in manager.snapshot()].count("shared") == 1
    assert manager.preemption_table() == [("be", 1, manager.block_table("be")[1], "rt", 0)]


def test_only_the_slots_about_to_be_overwritten_are_checkpointed():
    manager, memory, be = pending_be(6)
    rt = make_request("rt", True)
    manager.allocate_slots(rt, 2)
    memory.run_step([(rt, 2)])
    manager.begin_step([be])
    manager.allocate_slots(rt, 1)  # meets B5, the newest, and takes its slot alone
    assert len(manager._changes.copies.checkpoint) == manager.offloaded_tokens["be"] == 1
    memory.run_step([(rt, 1)])
    manager.check_integrity()


def test_be_runs_beside_an_rt_while_its_next_slot_is_free():
    manager, memory, be = pending_be(5)
    rt = make_request("rt", True)
    manager.allocate_slots(rt, 2)
    assert manager.allocate_slots(be, 1) is not None
    assert not manager._changes.copies
    memory.run_step([(rt, 2), (be, 1)])


def test_restore_copies_back_only_what_was_lost_in_place_once_the_rt_has_left():
    manager, memory, be = pending_be(8)
    rt = make_request("rt", True)
    manager.allocate_slots(rt, 3)
    memory.run_step([(rt, 3)])
    table = list(manager.block_table("be"))
    manager.free("rt")
    memory.forget(rt)
    manager.begin_step([be])
    assert manager.allocate_slots(be, 1) is None  # B8 needs a third block
    assert manager.offloaded_tokens["be"] == 3, "refused, so nothing was restored"
    be2 = make_request("be2", False)
    assert manager.allocate_slots(be2, 1) is None
    assert manager.block_table("be") == table


def test_be_relocates_when_the_rt_still_lives_in_its_block():
    manager, memory, be = pending_be(6, num_blocks=2)
    rt = make_request("rt", True)
    manager.allocate_slots(rt, 3)  # takes one slot of B5
    memory.run_step([(rt, 3)])
    old = manager.block_table("be")[1]
    manager.begin_step([be])
    assert manager.allocate_slots(be, 1) is None, "no empty block to move to"
    manager, memory, be = pending_be(6, num_blocks=3)
    filler = make_request("filler", True)
    manager.allocate_slots(filler, 4)
    manager.allocate_slots(rt := make_request("rt2", True), 3)
    memory.run_step([(filler, 4), (rt, 3)])
    manager.free("filler")
    memory.forget(filler)
    manager.begin_step([be])
    old = manager.block_table("be")[1]
    assert manager.allocate_slots(be, 1)[1] != old
    copies = manager._changes.copies
    assert (len(copies.relocate), len(copies.restore)) == (1, 1)  # B4 survived, B5 was lost
    memory.run_step([(be, 1)])
    manager.check_integrity()


def test_a_fully_overwritten_block_leaves_its_best_effort_owner():
    manager, memory, _be = pending_be(8)
    rt = make_request("rt", True)
    manager.allocate_slots(rt, 4)
    assert ON_HOST in manager.block_table("be")
    assert manager.offloaded_tokens["be"] == 4
    memory.run_step([(rt, 4)])
    assert Counter(view.state for view in manager.snapshot()) == {"rt_only": 1, "be_only": 1}


def test_a_best_effort_request_of_this_step_is_no_victim():
    manager, memory, be = pending_be(7)
    assert manager.allocate_slots(be, 1) is not None
    assert manager.allocate_slots(make_request("rt", True), 1) is None
    memory.run_step([(be, 1)])


@pytest.mark.parametrize(("unit", "lost"), [("slot", 1), ("block", 4), ("request", 8)])
def test_the_unit_of_preemption_is_what_an_rt_of_one_token_costs(unit, lost):
    manager, memory, _be = pending_be(8, unit=unit)
    rt = make_request("rt", True)
    assert manager.allocate_slots(rt, 1) is not None
    assert manager.offloaded_tokens["be"] == lost
    memory.run_step([(rt, 1)])


def test_a_full_host_store_refuses_and_changes_nothing():
    manager = bidirectional(1, 4, num_host_blocks=0)
    be = make_request("be", False)
    manager.begin_step()
    manager.allocate_slots(be, 4)
    manager.begin_step([be])
    before = manager.snapshot()
    assert manager.allocate_slots(make_request("rt", True), 1) is None
    assert not manager.swap_out("be")
    assert manager.snapshot() == before


def test_reclaim_spares_those_ordered_before():
    manager = bidirectional(2, 4)
    first, last = make_request("first", False), make_request("last", False)
    manager.begin_step()
    manager.allocate_slots(first, 4)
    manager.allocate_slots(last, 4)
    manager.begin_step([first, last])
    assert not manager.reclaim(last, 1)
    assert manager.reclaim(first, 1)
    assert manager.offloaded_tokens["last"] == 4


def test_an_rt_front_does_not_overwrite_a_best_effort_request_that_runs_in_this_step():
    manager, memory, be = pending_be(6)
    rt = make_request("rt", True)
    manager.allocate_slots(rt, 1)
    memory.run_step([(rt, 1)])  # R0 _ B5 B4
    manager.begin_step([be])
    assert manager.allocate_slots(be, 1) is not None  # R0 B6 B5 B4
    before = manager.snapshot()
    assert manager.allocate_slots(rt, 1) is None
    assert manager.snapshot() == before
    assert not manager._changes.copies
    memory.run_step([(be, 1)])


@pytest.mark.parametrize("num_host_blocks", [0, 1])
def test_an_rt_front_moves_on_over_best_effort_tokens_only_as_the_host_has_room_for_them(num_host_blocks):
    manager = bidirectional(2, 4, num_host_blocks=num_host_blocks)
    memory, be, rt = ShadowMemory(manager), make_request("be", False), make_request("rt", True)
    for request, count in ((be, 6), (rt, 2)):
        manager.begin_step([be] if request is rt else [])
        manager.allocate_slots(request, count)
        memory.run_step([(request, count)])
    for _ in range(2):  # the second token of the same block needs no second host block
        manager.begin_step([be])
        before = manager.snapshot()
        assert (manager.allocate_slots(rt, 1) is not None) == (num_host_blocks == 1)
        if num_host_blocks:
            memory.run_step([(rt, 1)])
        else:
            assert manager.snapshot() == before
        manager.check_integrity()


def test_the_partly_filled_block_of_an_rt_is_the_shared_one_so_that_only_one_block_is_touched():
    manager, memory, _be = pending_be(10, num_blocks=3)  # B0..B3 | B4..B7 | B8 B9 _ _
    be_table = list(manager.block_table("be"))
    rt = make_request("rt", True)
    assert manager.allocate_slots(rt, 6) == [be_table[1], be_table[2]]
    assert manager.offloaded_tokens["be"] == 4
    assert manager.host.num_blocks - manager.host.num_unused == 1
    memory.run_step([(rt, 6)])


def filled_by(*counts, num_blocks):
    """A manager whose pool best-effort requests "be0", "be1", ... of so many tokens have filled; and those requests, of
    which none runs in the step that has begun."""
    manager = bidirectional(num_blocks, 4)
    memory, all_be = ShadowMemory(manager), [make_request(f"be{i}", False) for i in range(len(counts))]
    manager.begin_step()
    for be, count in zip(all_be, counts, strict=True):
        manager.allocate_slots(be, count)
    memory.run_step(list(zip(all_be, counts, strict=True)))
    assert manager.num_free_blocks == 0
    manager.begin_step(all_be)
    return manager, memory, all_be


def test_an_rt_shares_with_the_best_effort_request_ordered_last():
    manager, _memory, _ = filled_by(2, 2, 2, num_blocks=3)
    assert manager.allocate_slots(make_request("rt", True), 1) == manager.block_table("be2")
    assert manager.allocate_slots(make_request("rt2", True), 1) == manager.block_table("be1")
    assert not manager.offloaded_tokens


def test_an_rt_finds_a_free_middle_behind_full_blocks_of_others():
    manager, _memory, _ = filled_by(2, 4, 4, num_blocks=3)
    assert manager.allocate_slots(make_request("rt", True), 1) == manager.block_table("be0")
    assert not manager.offloaded_tokens


@pytest.mark.parametrize(("unit", "lost"), [("slot", {}), ("block", {"be1": 4}), ("request", {"be1": 4})])
def test_only_slots_are_shared_coarser_units_take_the_last_in_order(unit, lost):
    manager = bidirectional(2, 4, unit)
    memory, all_be = ShadowMemory(manager), [make_request(f"be{i}", False) for i in range(2)]
    manager.begin_step()
    for be, count in zip(all_be, (2, 4), strict=True):
        manager.allocate_slots(be, count)
    memory.run_step([(all_be[0], 2), (all_be[1], 4)])
    manager.begin_step(all_be)
    assert manager.allocate_slots(make_request("rt", True), 1) is not None
    assert manager.offloaded_tokens == lost


def test_a_victim_gives_its_newest_blocks_first_and_the_last_in_order_gives_all_before_another_gives_any():
    manager, _memory, _ = filled_by(8, 8, num_blocks=4)
    tables = [list(manager.block_table(name)) for name in ("be0", "be1")]
    assert manager.allocate_slots(make_request("rt", True), 4) == [tables[1][1]]
    assert manager.allocate_slots(make_request("rt2", True), 4) == [tables[1][0]]
    assert manager.offloaded_tokens == {"be1": 8}
    assert manager.allocate_slots(make_request("rt3", True), 4) == [tables[0][1]]


def test_a_best_effort_request_that_runs_in_this_step_does_not_shield_those_ordered_before_it():
    manager, _memory, [_, running] = filled_by(4, 3, num_blocks=2)
    table = list(manager.block_table("be0"))
    assert manager.allocate_slots(running, 1) is not None
    assert manager.allocate_slots(make_request("rt", True), 4) == table
    assert manager.offloaded_tokens == {"be0": 4}


def test_a_victim_that_only_shares_frees_blocks_for_nobody_but_the_one_it_shares_with():
    manager, _memory, _ = filled_by(2, 4, num_blocks=2)
    manager.allocate_slots(make_request("rt", True), 2)  # beside be0
    assert manager.frees_blocks_for("be1", "other"), "it has a block of its own"
    assert manager.frees_blocks_for("be0", "rt")
    assert not manager.frees_blocks_for("be0", "other")


@pytest.mark.parametrize("make", [bidirectional, lambda *sizes: KVCacheManager(KVCacheConfig(*sizes))])
def test_a_token_that_stays_in_its_block_is_appended_without_looking_at_the_pool(make):
    manager, be = make(4, 16), make_request("be", False)
    manager.begin_step()
    manager.allocate_slots(be, 3)
    manager.pool = None
    for _ in range(13):
        manager.begin_step([be])
        assert manager.allocate_slots(be, 1) is not None
    with pytest.raises(AttributeError):
        manager.allocate_slots(be, 1)


def test_a_reset_forgets_everything_and_says_so():
    manager, memory, be = pending_be(8)
    manager.allocate_slots(make_request("rt", True), 3)
    manager.reset()
    assert (manager.num_used_blocks, manager.offloaded_tokens) == (0, {})
    assert manager.host.num_unused == manager.host.num_blocks
    changes = manager.take_changes()
    assert not changes.copies
    assert sorted(changes.block_changes) == [["be", -1, -1], ["rt", -1, -1]]
    memory.forget(be)
    manager.begin_step()
    manager.allocate_slots(be, 8)
    memory.run_step([(be, 8)])
    manager.check_integrity()


def test_a_host_block_is_not_given_out_while_a_copy_to_it_is_still_to_be_made():
    """A step may swap out and yet run no request; its copies then wait for the next step that runs."""
    manager, memory, [_, last] = filled_by(4, 4, num_blocks=2)
    assert manager.swap_out("be0")
    manager.free("be0")
    manager.begin_step([last])
    assert manager.swap_out("be1")
    memory.run_step([])
    manager.begin_step([last])
    assert manager.allocate_slots(last, 1) is not None
    memory.run_step([(last, 1)])
    assert manager.host.num_unused == manager.host.num_blocks


def test_a_full_host_store_does_not_keep_an_rt_out_of_a_free_middle():
    manager = bidirectional(1, 4, num_host_blocks=0)
    memory, be, rt = ShadowMemory(manager), make_request("be", False), make_request("rt", True)
    manager.begin_step()
    manager.allocate_slots(be, 2)
    memory.run_step([(be, 2)])
    manager.begin_step([be])
    assert manager.allocate_slots(rt, 3) is None, "its third token would overwrite one"
    assert manager.allocate_slots(rt, 2) is not None
    memory.run_step([(rt, 2)])


def test_a_full_host_store_does_not_keep_an_rt_that_comes_back_out_of_a_free_middle():
    """Its swapped-out block returns between the tokens of a best-effort request, of which nothing has to be saved."""
    manager = bidirectional(1, 4, num_host_blocks=1)
    memory, be, rt = ShadowMemory(manager), make_request("be", False), make_request("rt", True)
    for request, num_tokens in ((rt, 1), (be, 2)):
        manager.begin_step()
        assert manager.allocate_slots(request, num_tokens) is not None
        memory.run_step([(request, num_tokens)])
        if request is rt:
            assert manager.swap_out("rt"), "and the host store is full"
    manager.begin_step([be])
    assert manager.allocate_slots(rt, 2) is None, "its third token would overwrite one"
    assert manager.allocate_slots(rt, 1) is not None
    memory.run_step([(rt, 1)])
    manager.check_integrity()


def test_a_table_entry_from_before_its_block_was_given_up_is_stale_even_for_the_same_owner():
    manager, memory, be = pending_be(6)
    sequence = manager._sequences["be"]
    for _ in range(2):  # also one from before the last of several times
        manager.begin_step([be])
        blocks, epochs = list(sequence.block_ids), list(sequence.epochs)
        assert manager.swap_out("be")
        memory.run_step([])
        manager.begin_step([be])
        assert manager.allocate_slots(be, 1) is not None
        memory.run_step([(be, 1)])
    assert sorted(sequence.block_ids) == sorted(blocks)
    manager.check_integrity()
    by_block = dict(zip(blocks, epochs, strict=True))
    sequence.epochs[:] = [by_block[block_id] for block_id in sequence.block_ids]
    with pytest.raises(CacheIntegrityError, match="epoch"):
        manager.check_integrity()


def break_double_free(manager):
    manager.pool.free_ids.append(manager.pool.free_ids[-1])


def break_stale_epoch(manager):
    manager.pool.blocks[manager.block_table("be")[0]].epoch += 1


def break_foreign_owner(manager):
    manager.pool.blocks[manager.block_table("be")[0]].be = None


def break_lost_count(manager):
    manager.offloaded_tokens["be"] = 1


def break_overlap(manager):
    manager._sequences["rt"].num_slots += 2


def break_length(manager):
    manager._sequences["be"].num_slots += 8


def break_entry_too_many(manager):
    manager.block_table("be").append(0)


def break_entry_outside(manager):
    manager.block_table("be")[0] = 99


def break_host(manager):
    manager.host.free_ids.pop()


def break_lost_block(manager):
    sequence = manager._sequences["be"]
    sequence.offloaded[0], sequence.host_blocks[0] = 4, manager.host.free_ids.pop()
    manager.offloaded_tokens["be"] = 4


@pytest.mark.parametrize("damage", [break_double_free, break_stale_epoch, break_foreign_owner, break_lost_count,
                                    break_overlap, break_length, break_entry_too_many, break_entry_outside,
                                    break_host, break_lost_block])
def test_check_integrity_sees_each_kind_of_damage(damage):
    manager, memory, _be = pending_be(6, num_blocks=2)
    manager.allocate_slots(rt := make_request("rt", True), 2)
    memory.run_step([(rt, 2)])
    if damage is break_double_free:
        manager.free("rt")
        manager.free("be")
    manager.check_integrity()
    damage(manager)
    with pytest.raises(CacheIntegrityError, match=r"\d"):
        manager.check_integrity()
