"""The accounts of the host store, which need no vLLM: two arrays stand in for the pool and the store, and requests come
back with what they had."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.config import cdiv
from bros_ref.integrations.vllm.host_store import HostStore

BLOCK_SIZE = 4


class Device:
    """A pool of blocks, and the copies of a step as a worker makes them."""

    def __init__(self, num_blocks, store):
        self.slots = np.full((num_blocks, BLOCK_SIZE), -1)
        self.host = np.full((store.num_blocks, BLOCK_SIZE), -1)
        self.store = store

    def copy(self):
        copies = self.store.take_copies()
        for pool_id, host_id in copies.saves:
            self.host[host_id] = self.slots[pool_id]
        self.slots[:] = -1  # whatever was there is overwritten
        for pool_id, host_id in copies.loads:
            self.slots[pool_id] = self.host[host_id]

    def write(self, block_ids, tokens):
        for position, token in enumerate(tokens):
            self.slots[block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE] = token

    def read(self, block_ids, start, end):
        return [int(self.slots[block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE])
                for position in range(start, end)]


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("start", [0, 4, 8])
def test_a_request_comes_back_with_the_tokens_it_had(num_tokens, start):
    store = HostStore(3, BLOCK_SIZE)
    device, tokens = Device(12, store), list(range(100, 100 + num_tokens))
    device.write([5, 2, 7, 1], tokens)
    store.save("be", [5, 2, 7, 1], num_tokens)
    device.copy()
    assert store.num_tokens("be") == num_tokens
    assert store.num_used_blocks == cdiv(num_tokens, BLOCK_SIZE)
    if start < num_tokens:
        store.load("be", [8, 9, 10, 11], start, num_tokens)
        store.free("be")
        device.copy()
        assert device.read([8, 9, 10, 11], start, num_tokens) == tokens[start:]
        assert device.read([8, 9, 10, 11], 0, start) == [-1] * start  # blocks of the prefix cache are not written
        assert store.num_used_blocks == 0


@pytest.mark.parametrize(("num_blocks", "kept"), [(1, 4), (2, 8), (3, 10), (4, 10)])
def test_a_full_store_keeps_the_first_tokens(num_blocks, kept):
    store = HostStore(num_blocks, BLOCK_SIZE)
    store.save("be-0", [1, 2, 3], 10)
    assert store.num_tokens("be-0") == kept
    store.save("be-1", [4, 5], 8)
    assert store.num_tokens("be-1") == (4 if num_blocks == 4 else 0)
    assert store.num_tokens("be-0") == kept  # nothing is dropped for another


def test_free_and_clear():
    store = HostStore(3, BLOCK_SIZE)
    store.free("unknown")
    for num_tokens in (9, 5):  # a second save replaces the first
        store.save("be", [1, 2, 3], num_tokens)
        store.take_copies()
    assert store.num_tokens("be") == 5
    assert store.num_used_blocks == 2
    store.clear()
    assert store.num_tokens("be") == store.num_used_blocks == 0
    assert store.take_copies().saves == []


@settings(max_examples=60, deadline=None)
@given(num_blocks=st.integers(1, 8), data=st.data())
def test_random_lives(num_blocks, data):
    """Preempted, resumed and aborted at random: tokens are exact, and no block is lost or has two owners."""
    store, stored, next_token = HostStore(num_blocks, BLOCK_SIZE), {}, 0
    device = Device(100, store)
    for step in range(12):
        saved = range(data.draw(st.integers(0, 2)))
        resumed = [name for name in stored if data.draw(st.booleans())]
        for number in saved:
            count = data.draw(st.integers(1, 3 * BLOCK_SIZE))
            name, block_ids = f"{step}-{number}", [10 * number + index for index in range(3)]
            tokens = list(range(next_token, next_token + count))
            next_token += count
            device.write(block_ids, tokens)
            store.save(name, block_ids, count)
            if store.num_tokens(name):
                stored[name] = tokens[:store.num_tokens(name)]
        for index, name in enumerate(resumed):
            block_ids = [40 + 4 * index + block for block in range(3)]
            store.load(name, block_ids, 0, len(stored[name]))
            store.free(name)
        device.copy()
        for index, name in enumerate(resumed):
            tokens = stored.pop(name)
            assert device.read([40 + 4 * index + block for block in range(3)], 0, len(tokens)) == tokens
        for name in [name for name in stored if data.draw(st.integers(0, 9)) == 0]:  # aborted
            store.free(name)
            del stored[name]
        assert store.num_used_blocks == sum(cdiv(len(tokens), BLOCK_SIZE) for tokens in stored.values()) <= num_blocks
