"""KVStorage against a dictionary that is told the same things slot by slot."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.storage import KVStorage

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 3


def make(num_blocks: int = 4, block_size: int = 3, host_blocks: int | None = None,
         dtype: torch.dtype = torch.float32) -> KVStorage:
    """A storage in which every number is different, so that a row from the wrong place is seen."""
    kv = KVStorage(LAYERS, KV_HEADS, HEAD_DIM, KVCacheConfig(num_blocks, block_size, host_blocks), dtype)
    kv.data.copy_(torch.arange(kv.data.numel()).view(kv.data.shape))
    return kv


def rows(kv: KVStorage) -> list[torch.Tensor]:
    """A copy of every device slot, [LAYERS, 2, KV_HEADS, HEAD_DIM] each."""
    return list(kv.data.flatten(2, 3).clone().unbind(2))


def pairs(sources: int, destinations: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, sources - 1), st.integers(0, destinations - 1)), max_size=6,
                    unique_by=lambda pair: pair[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@given(rounds=st.lists(st.tuples(pairs(12, 6), pairs(12, 12), pairs(6, 12)), min_size=1, max_size=3))
def test_copies_do_what_three_plain_loops_do(dtype: torch.dtype,
                                             rounds: list[tuple[list[tuple[int, int]], ...]]) -> None:
    kv = make(num_blocks=4, block_size=3, host_blocks=2, dtype=dtype)
    device, host = rows(kv), [torch.zeros_like(rows(kv)[0])] * 6
    for checkpoint, relocate, restore in rounds:
        kv.run_copies(checkpoint, relocate, restore)
        for source, destination in checkpoint:
            host[destination] = device[source]
        before = list(device)  # every read of the relocation comes before any of its writes
        for source, destination in relocate:
            device[destination] = before[source]
        for source, destination in restore:
            device[destination] = host[source]
    assert torch.equal(kv.data.flatten(2, 3), torch.stack(device, dim=2))
    assert torch.equal(kv.host_data, torch.stack(host, dim=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("block_size", [1, 4])
@given(data=st.data())
def test_what_is_written_is_gathered_in_logical_order(dtype: torch.dtype, block_size: int, data: st.DataObject) -> None:
    lengths = {1, block_size - 1, block_size, block_size + 1, 2 * block_size + 1} - {0}
    tokens = data.draw(st.sampled_from(sorted(lengths)))
    reversed_ = data.draw(st.booleans())
    table = data.draw(st.permutations(range(5)))[:-(-tokens // block_size)]
    kv = make(num_blocks=5, block_size=block_size, dtype=dtype)
    before = kv.data.clone()
    slots = [table[p // block_size] * block_size + (block_size - 1 - p % block_size if reversed_ else p % block_size)
             for p in range(tokens)]
    k, v = (torch.randint(-99, 99, (tokens, KV_HEADS, HEAD_DIM)).to(dtype) for _ in "kv")
    kv.write(1, k, v, torch.tensor(slots))
    got_k, got_v = kv.gather_dense(1, table, tokens, reversed_)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)
    untouched = [slot for slot in range(5 * block_size) if slot not in slots]
    assert torch.equal(kv.data.flatten(2, 3)[:, :, untouched], before.flatten(2, 3)[:, :, untouched])
    assert torch.equal(kv.data[0], before[0])


def test_no_tokens_are_gathered_as_no_rows() -> None:
    k, v = make().gather_dense(1, [], 0, False)
    assert k.shape == v.shape == (0, KV_HEADS, HEAD_DIM)


def test_layers_are_views_of_one_allocation() -> None:
    kv = make()
    assert kv.k(1).shape == kv.v(1).shape == (4, 3, KV_HEADS, HEAD_DIM)
    kv.k(1)[2, 1] = -1
    kv.v(0)[3, 0] = -2
    assert (kv.data[1, 0, 2, 1] == -1).all()
    assert (kv.data[0, 1, 3, 0] == -2).all()
    assert kv.data.is_contiguous()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.int64, 8)])
def test_slot_bytes_is_one_token_over_all_layers(dtype: torch.dtype, size: int) -> None:
    kv = make(dtype=dtype)
    assert kv.slot_bytes == 2 * LAYERS * KV_HEADS * HEAD_DIM * size
    assert kv.slot_bytes * kv.config.num_slots == kv.data.untyped_storage().nbytes()


def test_host_store_is_made_by_the_first_copy_that_needs_it() -> None:
    kv = make()
    kv.run_copies(relocate=[(0, 1)])
    assert not kv._host
    kv.run_copies(checkpoint=[(0, 1)])
    assert kv._host


def test_the_host_store_grows_with_what_is_stored_and_a_copy_across_its_segments_is_one_copy(monkeypatch) -> None:
    slot_bytes = make().slot_bytes
    monkeypatch.setattr("bros_ref.kv_cache.storage.HOST_SEGMENT_BYTES", 5 * slot_bytes)
    kv = make(num_blocks=4, block_size=3, host_blocks=4)
    device = rows(kv)
    kv.run_copies(checkpoint=[(0, 11)])
    assert [segment.shape[2] for segment in kv._host.values()] == [5], "a 12-slot store, of which one slot is used"
    kv.run_copies(checkpoint=[(slot, slot) for slot in range(12)])
    assert torch.equal(kv.host_data, torch.stack(device, dim=2))
    kv.data.zero_()
    kv.run_copies(restore=[(slot, 11 - slot) for slot in range(12)])
    assert torch.equal(kv.data.flatten(2, 3), torch.stack(device[::-1], dim=2))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_pool_costs_no_memory_before_it_is_used(dtype: torch.dtype) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    kv = KVStorage(4, 4, 64, KVCacheConfig(2_000, 16, 8_000), dtype)
    kv.run_copies(checkpoint=[(0, 100_000)])
    assert kv.data.untyped_storage().nbytes() > 100e6
    assert resident_bytes() - before < 20e6
    assert not kv.data[3, 1, 1_999].any()


@pytest.mark.parametrize(("lists", "message"), [
    ({"checkpoint": [(0, 6)]}, "checkpoint copy 0 -> 6"),
    ({"checkpoint": [(12, 0)]}, "checkpoint copy 12 -> 0"),
    ({"relocate": [(0, -1)]}, "relocate copy 0 -> -1"),
    ({"restore": [(6, 0)]}, "restore copy 6 -> 0"),
    ({"restore": [(0, 3), (1, 3)]}, "write a slot twice"),
])
def test_a_bad_copy_is_refused_before_anything_moves(lists: dict[str, list[tuple[int, int]]], message: str) -> None:
    kv = make(num_blocks=4, block_size=3, host_blocks=2)
    before = kv.data.clone()
    with pytest.raises(ValueError, match=message):
        kv.run_copies(**{"relocate": [(0, 1)]} | lists)
    assert torch.equal(kv.data, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_readers_on_a_gpu_wait_for_their_layers_restore() -> None:
    kv = KVStorage(8, 8, 128, KVCacheConfig(256, 16), torch.float16, "cuda")
    kv.data.normal_()
    expected = kv.data.clone()
    slots = list(range(kv.config.num_slots))
    kv.run_copies(checkpoint=[(slot, slot) for slot in slots])
    kv.data.fill_(torch.nan)
    kv.run_copies(restore=[(slot, slot) for slot in slots])
    for layer in range(8):
        torch.testing.assert_close(kv.k(layer), expected[layer, 0], rtol=0, atol=0)
        torch.testing.assert_close(kv.v(layer), expected[layer, 1], rtol=0, atol=0)
