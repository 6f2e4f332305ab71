"""The promise that carries the project: same tokens, always. For any policy, cache manager, seed and memory pressure,
the engine gives every request the tokens it would get alone. Exact integers: any lost, stale or foreign K/V shows."""

import random

import pytest
from harness import alone, checksum_engine, random_requests, run
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.request import RequestStatus
from bros_ref.scheduler import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(5, 30), block_size=st.sampled_from([1, 2, 4, 16]),
       chunked=st.booleans(), host=st.sampled_from([None, 0, 2]), abort_rate=st.sampled_from([0.0, 0.1]))
def test_every_request_gets_the_tokens_it_would_get_alone(policy, seed, num_blocks, block_size, chunked, host,
                                                          abort_rate):
    rng = random.Random(seed)
    engine = checksum_engine(policy, num_blocks, block_size, host, chunked_prefill=chunked,
                             max_num_batched_tokens=rng.choice([8, 64]), be_max_wait_steps=rng.choice([2, 16]))
    requests = random_requests(rng, 12, num_blocks * block_size, block_size, spread_s=0.5)
    run(engine, requests, rng, abort_rate)
    for request in requests:
        expected = alone(request)
        if request.status is RequestStatus.ABORTED:
            assert request.output_token_ids == expected[:len(request.output_token_ids)]
        else:
            assert request.output_token_ids == expected, f"{request.request_id} under {policy}"
    assert engine.scheduler.kv.num_used_blocks == 0
    host_store = getattr(engine.scheduler.kv, "host", None)
    assert host_store is None or host_store.num_unused == host_store.num_blocks
