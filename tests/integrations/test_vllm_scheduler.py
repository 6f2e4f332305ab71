"""BROS inside vLLM's own scheduler, without a model: `ChecksumRunner` gives a request the tokens that it would get
alone only if every block held what its table says. Needs vLLM (`make test-vllm`)."""

import random
from collections import deque
from dataclasses import replace
from itertools import pairwise
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs and uses it")

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from bros_ref.integrations.vllm import BROSScheduler
from bros_ref.integrations.vllm.bench import run
from bros_ref.integrations.vllm.connector import CopyMetadata, HostKVConnector
from bros_ref.integrations.vllm.host_store import Copies
from bros_ref.integrations.vllm.stepping import Pool, Stepper, next_token

SLO = {"ttft_slo_s": 0.6, "tpot_slo_s": 0.4}
KNOWN = {"latency": (0.032, 0.0025, 0.0, 0.0)}
TIGHT = Pool(max_num_seqs=4, max_num_batched_tokens=64, num_blocks=24, block_size=16)


def alone(prompt, num):
    """The tokens that a request gets when nothing else runs."""
    tokens = list(prompt)
    for _ in range(num):
        tokens.append(next_token(tokens))
    return tokens[len(prompt):]


def prompt_of(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(1, 30_000) for _ in range(length)]


def step_until(stepper, condition, most_steps=5_000):
    for _ in range(most_steps):
        if condition():
            return
        stepper.step()
    raise AssertionError(f"not so after {most_steps} steps; unfinished: {list(stepper.scheduler.requests)}")


def finish(stepper):
    step_until(stepper, lambda: not stepper.scheduler.has_unfinished_requests())
    stepper.step()  # tells the runner who finished


def assert_nothing_is_left(stepper, pool):
    assert stepper.num_free_blocks == pool.num_blocks
    assert not stepper.scheduler.requests
    assert not stepper.scheduler.planner.requests
    assert not stepper.scheduler.planner.running
    if pool.num_host_blocks:
        assert stepper.scheduler.connector.store.num_used_blocks == 0


@pytest.mark.parametrize("num_host_blocks", [0, 1, 7, 200])
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_the_tokens_that_it_would_get_alone(seed, prefix_caching, num_host_blocks):
    rng = random.Random(seed)
    pool = Pool(max_num_seqs=rng.choice([2, 3, 4]), max_num_batched_tokens=rng.choice([16, 64, 256]), num_blocks=24,
                block_size=rng.choice([8, 16]), prefix_caching=prefix_caching, num_host_blocks=num_host_blocks)
    stepper = Stepper(BROSScheduler, pool, settings=rng.choice([KNOWN, {}]))
    wanted, preempted = {}, 0
    shared = prompt_of(seed, 40)
    for number in range(40):
        prompt = shared[:rng.choice([0, 16, 40])] + prompt_of(100 * seed + number, rng.choice([1, 15, 16, 17, 90]))
        num = rng.choice([1, 2, 16, 40])
        stepper.add(str(number), prompt, num, **(SLO if rng.random() < 0.4 else {}))
        wanted[str(number)] = alone(prompt, num)
        for _ in range(rng.choice([0, 1, 5, 20])):
            stepper.step()
            preempted += len(stepper.scheduler.planner.output.preempted)
    finish(stepper)
    assert {name: served.token_ids for name, served in stepper.served.items()} == wanted
    assert preempted > 0  # 24 blocks do not hold them all
    assert_nothing_is_left(stepper, pool)


@pytest.mark.parametrize("num_host_blocks", [0, 9, 100])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_no_block_leaks_in_500_requests_with_aborts(prefix_caching, num_host_blocks):
    rng = random.Random(7)
    pool = Pool(max_num_seqs=4, max_num_batched_tokens=64, num_blocks=24, prefix_caching=prefix_caching,
                num_host_blocks=num_host_blocks)
    stepper = Stepper(BROSScheduler, pool, settings=KNOWN)
    ends, wanted = set(), {}
    for number in range(500):
        prompt, num = prompt_of(number % 50, rng.choice([1, 16, 33, 100])), rng.choice([1, 8, 24])
        stepper.add(str(number), prompt, num, **(SLO if rng.random() < 0.3 else {}))
        wanted[str(number)] = (prompt, num)
        stepper.step()
        live = list(stepper.scheduler.requests.values())
        if live and rng.random() < 0.6:
            victim = rng.choice(live)
            ends.add(victim.status)
            stepper.scheduler.finish_requests(victim.request_id, RequestStatus.FINISHED_ABORTED)
            del wanted[victim.request_id]
    finish(stepper)
    assert {RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED} <= ends
    assert all(stepper.served[name].token_ids == alone(*request) for name, request in wanted.items())
    assert_nothing_is_left(stepper, pool)


@pytest.mark.parametrize("max_holders", [None, 2])
def test_rt_takes_the_seat_of_be_in_the_next_step(max_holders):
    """vLLM's own priority policy leaves a waiting request waiting (checked here too)."""
    pool = Pool(max_num_seqs=2)
    waits = Stepper(Scheduler, pool, policy="priority")
    ours = Stepper(BROSScheduler, pool, settings=KNOWN)
    ours.scheduler.planner.max_holders = max_holders  # 2: as with vLLM's model runner V2
    for stepper in (waits, ours):
        for name in ("be-0", "be-1"):
            stepper.add(name, prompt_of(name, 20), 60, priority=1)
        for _ in range(5):
            stepper.step()
        stepper.add("rt", prompt_of("rt", 20), 4, priority=0, **(SLO if stepper is ours else {}))
        stepper.step()
    assert waits.served["rt"].steps == []
    assert ours.served["rt"].steps == [6]
    preempted = [request.request_id for request in ours.scheduler.requests.values() if request.num_preemptions]
    assert preempted == ([] if max_holders is None else ["be-1"])  # it keeps its KV where it may
    finish(ours)
    assert {name: served.token_ids for name, served in ours.served.items()} == {
        name: alone(prompt_of(name, 20), num) for name, num in (("be-0", 60), ("be-1", 60), ("rt", 4))}


def test_rt_takes_the_blocks_of_be_in_the_next_step():
    stepper = Stepper(BROSScheduler, TIGHT, settings=KNOWN)
    for name in ("be-0", "be-1"):  # together they need more than the 24 blocks
        stepper.add(name, prompt_of(name, 180), 60)
    step_until(stepper, lambda: stepper.num_free_blocks == 0)
    stepper.add("rt", prompt_of("rt", 33), 4, **SLO)
    now = stepper.num_steps
    stepper.step()
    assert stepper.served["rt"].steps == [now + 1]
    finish(stepper)
    assert {name: served.token_ids for name, served in stepper.served.items()} == {
        name: alone(prompt_of(name, length), num) for name, length, num in (
            ("be-0", 180, 60), ("be-1", 180, 60), ("rt", 33, 4))}
    assert_nothing_is_left(stepper, TIGHT)


@pytest.mark.parametrize("max_wait", [1, 5, 16])
@pytest.mark.parametrize("num_be", [1, 3])
def test_the_bound_on_the_waiting_of_be(max_wait, num_be):
    """RT that never end take every seat and leave no time; BE runs at the latest N + S steps after it last ran."""
    pool = Pool(max_num_seqs=4, max_num_batched_tokens=32, num_blocks=200)
    stepper = Stepper(BROSScheduler, pool, settings=KNOWN | {"be_max_wait_steps": max_wait})
    for index in range(num_be):
        stepper.add(f"be-{index}", prompt_of(index, 20), 1000)
    step_until(stepper, lambda: all(stepper.served[f"be-{index}"].token_ids for index in range(num_be)))
    for number in range(150):
        stepper.add(f"rt-{number}", prompt_of(number, 30), 20, ttft_slo_s=0.1, tpot_slo_s=0.001)  # cannot be kept
        stepper.step()
    for index in range(num_be):
        steps = [*stepper.served[f"be-{index}"].steps, stepper.num_steps]
        gaps = [later - earlier for earlier, later in pairwise(steps)]
        assert max(gaps) <= max_wait + num_be + 1
        assert max(gaps) >= max_wait  # it did have to wait


def test_starving_be_fits_where_rt_fill_the_budget():
    """Its tokens come on top of our budget, but not of vLLM's: the longest chunk makes room."""
    stepper = Stepper(BROSScheduler, Pool(max_num_batched_tokens=32), settings=KNOWN | {"be_max_wait_steps": 2})
    stepper.add("be", prompt_of("be", 40), 50)
    step_until(stepper, lambda: stepper.served["be"].token_ids)
    stepper.add("rt", prompt_of("rt", 1000), 2, **SLO)
    totals = [stepper.step().total_num_scheduled_tokens for _ in range(12)]
    assert max(totals) <= 32
    assert len([step for step in stepper.served["be"].steps if step > stepper.num_steps - 12]) >= 3


def test_arguments_that_make_no_sense_end_one_request_and_not_the_engine():
    stepper = Stepper(BROSScheduler, TIGHT, settings=KNOWN)
    stepper.add("wrong", [1, 2], 4, bros_class="fast")
    stepper.step()
    assert stepper.served["wrong"].finish_reason == "error"
    stepper.add("right", [1, 2], 4, bros_class="rt")
    finish(stepper)
    assert stepper.served["right"].token_ids == alone([1, 2], 4)
    assert_nothing_is_left(stepper, TIGHT)


def test_pausing_and_resetting_the_prefix_cache():
    """What vLLM does to its scheduler from outside: requests wait, or lose their KV, and still get their tokens."""
    pool = Pool(max_num_seqs=4, max_num_batched_tokens=64, num_blocks=24, prefix_caching=True)
    stepper = Stepper(BROSScheduler, pool, settings=KNOWN)
    for number in range(3):
        stepper.add(f"be-{number}", prompt_of(number, 40), 30)
    step_until(stepper, lambda: stepper.served["be-0"].token_ids)
    stepper.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert stepper.step().num_scheduled_tokens == {}
    stepper.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    stepper.add("rt", prompt_of("rt", 20), 3, **SLO)
    assert "rt" not in stepper.step().num_scheduled_tokens
    stepper.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert "rt" in stepper.step().num_scheduled_tokens
    assert stepper.scheduler.reset_prefix_cache(reset_running_requests=True)
    finish(stepper)
    assert {name: served.token_ids for name, served in stepper.served.items()} == {
        "rt": alone(prompt_of("rt", 20), 3), **{f"be-{n}": alone(prompt_of(n, 40), 30) for n in range(3)}}
    assert_nothing_is_left(stepper, pool)


def test_a_request_whose_grammar_is_being_compiled_waits_and_holds_nobody_up():
    stepper = Stepper(BROSScheduler, TIGHT, settings=KNOWN)
    stepper.add("constrained", prompt_of("c", 20), 3, json_schema='{"type": "object"}', **SLO)
    request = stepper.scheduler.requests["constrained"]
    assert request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    stepper.add("be", prompt_of("be", 20), 3)
    for _ in range(3):
        stepper.step()
    assert stepper.served["constrained"].steps == []
    assert stepper.served["be"].steps
    request.structured_output_request.grammar = MagicMock()
    finish(stepper)
    assert stepper.served["constrained"].token_ids == alone(prompt_of("c", 20), 3)
    stepper.add("aborted", prompt_of("a", 20), 3, json_schema='{"type": "object"}')
    stepper.scheduler.finish_requests("aborted", RequestStatus.FINISHED_ABORTED)
    finish(stepper)
    assert_nothing_is_left(stepper, TIGHT)


def test_what_is_not_supported_is_refused_by_name():
    with pytest.raises(ValueError, match="scheduling-policy other than fcfs"):
        Stepper(BROSScheduler, TIGHT, policy="priority")
    with pytest.raises(ValueError, match=r"keys among.*rt_slowdown"):
        Stepper(BROSScheduler, TIGHT, settings={"slow": 1})
    scheduler = Stepper(BROSScheduler, replace(TIGHT, num_host_blocks=1)).scheduler
    scheduler.dcp_world_size = 2
    with pytest.raises(ValueError, match="HostKVConnector with context parallelism"):
        scheduler._refuse_unsupported()
    scheduler.connector = MagicMock()
    with pytest.raises(ValueError, match="KV connectors other than HostKVConnector"):
        scheduler._refuse_unsupported()


@pytest.mark.parametrize(("kv_role", "options", "message"), [
    ("kv_producer", {"num_host_blocks": 1}, '"kv_role": "kv_both"'), ("kv_both", {}, "got None"),
    ("kv_both", {"num_host_blocks": 0}, "got 0"), ("kv_both", {"num_host_blocks": "9"}, "got '9'"),
    ("kv_both", {"num_host_blocks": True}, "got True")])
def test_settings_of_the_connector_that_make_no_sense_are_refused(kv_role, options, message):
    config = MagicMock(kv_transfer_config=KVTransferConfig(
        kv_connector="HostKVConnector", kv_role=kv_role, kv_connector_extra_config=options))
    with pytest.raises(ValueError, match=message):
        HostKVConnector(config, KVConnectorRole.SCHEDULER, MagicMock())


@pytest.mark.parametrize(("shape", "fits"), [((6, 4, 5), True), ((12, 2, 5), True), ((2, 6, 10), False)])
def test_the_connector_knows_where_the_blocks_are(shape, fits):
    """Kernels may use smaller blocks than the scheduler; a layout that does not begin with the block is refused."""
    connector = Stepper(BROSScheduler, Pool(num_blocks=5, num_host_blocks=2)).runner.connector  # and vLLM's null block
    cache = torch.arange(120.0).view(shape)
    if not fits:
        with pytest.raises(ValueError, match=r"first dimension is the block; layer has the shape \[2, 6, 10\]"):
            connector.register_kv_caches({"layer": cache})
        return
    connector.register_kv_caches({"layer": cache})
    copies = Copies(saves=[(3, 1), (5, 0)], loads=[(0, 1)])
    connector.handle_preemptions(CopyMetadata(copies))
    connector.bind_connector_metadata(CopyMetadata(copies))
    connector.start_load_kv(None)
    blocks = cache.view(6, 20)
    assert blocks[0].tolist() == blocks[3].tolist() == list(range(60, 80))


def test_resetting_the_prefix_cache_and_the_connector_forgets_what_is_on_the_host():
    pool = replace(TIGHT, num_host_blocks=30)
    stepper = Stepper(BROSScheduler, pool, settings=KNOWN)
    for name in ("be-0", "be-1"):
        stepper.add(name, prompt_of(name, 180), 60)
    step_until(stepper, lambda: stepper.num_free_blocks == 0)
    stepper.add("rt", prompt_of("rt", 33), 4, **SLO)
    store = stepper.scheduler.connector.store
    step_until(stepper, lambda: store.num_used_blocks > 0)
    assert stepper.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    assert store.num_used_blocks == 0
    finish(stepper)
    assert all(served.token_ids == alone(prompt_of(name, 33 if name == "rt" else 180), 4 if name == "rt" else 60)
               for name, served in stepper.served.items())
    assert_nothing_is_left(stepper, pool)


@pytest.mark.parametrize("num_host_blocks", [0, 7, 100])
@pytest.mark.parametrize("seed", range(3))
def test_asynchronous_scheduling(seed, num_host_blocks):
    """Each step is scheduled before the output of the one before is known."""
    rng = random.Random(seed)
    pool = replace(TIGHT, num_host_blocks=num_host_blocks)
    stepper = Stepper(BROSScheduler, pool, settings=KNOWN, is_async=True)
    assert type(stepper.scheduler).__name__ == "AsyncBROSScheduler"
    wanted, in_flight, number = {}, deque(), 0
    while number < 25 or stepper.scheduler.has_unfinished_requests() or in_flight:
        if number < 25:
            prompt, num = prompt_of(100 * seed + number, rng.choice([1, 16, 33, 100])), rng.choice([1, 2, 24])
            stepper.add(str(number), prompt, num, **(SLO if rng.random() < 0.4 else {}))
            wanted[str(number)] = alone(prompt, num)
            number += 1
        for _ in range(rng.choice([1, 4])):
            in_flight.append(stepper.scheduler.schedule())
            if len(in_flight) == 2:
                stepper.update(in_flight.popleft())
        if number == 25 and in_flight and not in_flight[0].num_scheduled_tokens:
            stepper.update(in_flight.popleft())
        assert stepper.now_s < 1000
    assert {name: served.token_ids for name, served in stepper.served.items()} == wanted
    assert_nothing_is_left(stepper, pool)


@pytest.mark.parametrize("budget", [256, 2048])
def test_the_hybrid_workload_on_the_modelled_clock(budget):
    """The figures of docs/vllm.md: everything here is decided by counts and a modelled clock."""
    bros, priority = run(["bros", "vllm-priority"], [budget], range(7), prefix_caching=True)
    recomputing, restoring = run(["bros", "bros-host"], [budget], range(7), prefix_caching=False)
    for row in (bros, recomputing, restoring):
        assert row["ttft_p50_s"] <= 0.35
        assert row["ttft_p99_s"] <= 0.57
        assert row["num_on_time"] >= 83
    assert bros["be_tokens_per_s"] >= 43
    assert recomputing["be_tokens_per_s"] >= 42.5
    assert restoring["be_tokens_per_s"] >= 43
    assert recomputing["recomputed_tokens"] > restoring["recomputed_tokens"] == 0
    assert bros["num_on_time"] > 2 * priority["num_on_time"]


def recomputed_tokens(num_host_blocks):
    """Two BE of 240 tokens each share 24 blocks of 16 with RT that come and go."""
    pool = replace(TIGHT, num_host_blocks=num_host_blocks)
    stepper = Stepper(BROSScheduler, pool, settings=KNOWN)
    for name in ("be-0", "be-1"):
        stepper.add(name, prompt_of(name, 180), 60)
    for number in range(5):
        for _ in range(20):
            stepper.step()
        stepper.add(f"rt-{number}", prompt_of(number, 60), 4, **SLO)
    finish(stepper)
    assert_nothing_is_left(stepper, pool)
    assert all(served.token_ids == alone(prompt_of(name, 180), 60) for name, served in stepper.served.items()
               if name.startswith("be"))
    return stepper.num_recomputed_tokens


def test_what_is_on_the_host_is_not_recomputed():
    """The more host blocks, the fewer tokens are computed twice; with enough of them, none."""
    without, little, enough = (recomputed_tokens(num) for num in (0, 3, 30))
    assert without >= little + 3 * TIGHT.block_size
    assert enough == 0
