"""The promise that carries the project: same tokens, always. For any policy, cache manager, seed and memory pressure,
the engine gives every request the tokens it would get alone. Exact integers: any lost, stale or foreign K/V shows."""

import json
import random

import pytest
from harness import FailingRunner, accepted_budget, alone, checksum_engine, random_requests, run
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bros_ref.request import RequestStatus
from bros_ref.scheduler import POLICIES
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.trace.metrics import summarise


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@example(seed=26, num_blocks=26, block_size=4, chunked=False, host=0, abort_rate=0.1)  # bros-plus: a due BE, twice
@example(seed=1581291, num_blocks=23, block_size=16, chunked=True, host=2, abort_rate=0.0)  # swap-block: RT in turns
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


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_everything_that_can_go_wrong_at_once_costs_nobody_else_a_token(policy, seed):
    """Pools down to two tokens, one seat, one token per step, little host memory, no fitted latency model, aborts and
    failing steps: requests that end normally get the tokens they would get alone, the others a prefix of them."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 16])
    num_blocks = rng.choice([2, 3, 5, 8, 20])
    seats, budget = rng.choice([1, 2, 6, 16]), rng.choice([1, 2, 8, 64])
    engine = checksum_engine(
        policy, num_blocks, block_size, rng.choice([None, 0, 1, 2]), chunked_prefill=rng.random() < 0.5,
        max_num_seqs=seats, max_num_batched_tokens=accepted_budget(policy, seats, budget),
        be_max_wait_steps=rng.choice([1, 4, 128]), base_batch_cap=rng.choice([1, 2, 128]),
        min_chunk_tokens=rng.choice([1, 4, 16]), be_aging_tokens_per_step=rng.choice([0, 1, 3]))
    if rng.random() < 0.2:
        engine.scheduler.latency = StepLatencyModel()
    engine.runner = FailingRunner(engine.runner, rng, rng.choice([0.05, 0.2]))
    requests = random_requests(rng, 12, num_blocks * block_size, block_size, spread_s=rng.choice([0.0, 0.3, 1.5]))
    run(engine, requests, rng, abort_rate=rng.choice([0.0, 0.2]))
    for request in requests:
        cut_short = request.status in (RequestStatus.ABORTED, RequestStatus.FAILED)
        expected = alone(request)
        assert request.output_token_ids == expected[:len(request.output_token_ids) if cut_short else None]
    assert engine.scheduler.kv.num_used_blocks == 0
    assert not engine.scheduler.kv.offloaded_tokens
    host_store = getattr(engine.scheduler.kv, "host", None)
    assert host_store is None or host_store.num_unused == host_store.num_blocks
    json.dumps(summarise(engine.trace), allow_nan=False)
