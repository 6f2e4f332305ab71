"""The engine's promises when things go wrong: refusals, aborts in any state, failing steps, callbacks, stop strings."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import (
    FailingRunner,
    alone,
    byte_engine,
    check_accounts,
    checksum_engine,
    make_request,
    random_requests,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.clock import WallClock
from bros_ref.engine import EngineStalled, LLMEngine, RequestRefused, StepFailed
from bros_ref.engine.llm_engine import RequestsFailed
from bros_ref.engine.serve import ServeInterrupted, keep_class, serve
from bros_ref.request import SLO, Request, RequestClass, RequestStatus, SamplingParams
from bros_ref.scheduler import POLICIES
from bros_ref.scheduler.output import SchedulerOutput
from bros_ref.trace.metrics import summarise
from bros_ref.workload import ClosedLoopBatches, Workload, WorkloadItem, uniform_lengths

# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "said"), [
    (lambda: make_request("r", True, [], 4), "empty"),
    (lambda: Request("r", RequestClass.BEST_EFFORT, [1], arrival_s=math.nan), "arrival_s"),
    (lambda: Request("r", RequestClass.REAL_TIME, [1]), "SLO"),
    (lambda: Request("r", RequestClass.BEST_EFFORT, [1], slo=SLO(1, 1)), "best-effort"),
    (lambda: SLO(-1.0, 0.1), "ttft_s"),
    (lambda: SLO(1.0, 0.0), "tpot_s"),
    (lambda: SLO(math.nan, 0.1), "ttft_s"),
    (lambda: SamplingParams(max_tokens=0), "max_tokens"),
    (lambda: SamplingParams(temperature=math.nan), "temperature"),
    (lambda: SamplingParams(top_p=0.0), "top_p"),
    (lambda: SamplingParams(stop=("",)), "stop"),
])
def test_an_impossible_request_is_refused_where_it_is_written(build, said):
    with pytest.raises(ValueError, match=said):
        build()


@pytest.mark.parametrize("policy", POLICIES)
def test_what_could_never_finish_is_refused_and_everything_else_goes_on(policy):
    engine = checksum_engine(policy, num_blocks=5, block_size=4, max_context_tokens=19)
    good = make_request("good", False, [5, 6, 7], 4)
    engine.add_request(good)
    for request, said in [(make_request("pool", True, [1] * 20, 1), "context of 19"),
                          (make_request("context", False, [1] * 15, 5), "context of 19"),
                          (make_request("good", False, [1], 1), "used before")]:
        with pytest.raises(RequestRefused, match=said):
            engine.add_request(request)
    run(engine, [])
    assert good.output_token_ids == alone(good)
    assert set(engine.trace.rejected) == {"pool", "context"}
    assert {name: record.request_id for name, record in engine.trace.requests.items()} == {
        name: name for name in ("good", "pool", "context")}
    assert not engine.abort("pool"), "it was never there"


def test_a_prompt_larger_than_the_pool_is_refused():
    engine = checksum_engine("bros", num_blocks=2, block_size=4)
    with pytest.raises(RequestRefused, match="KV pool of 8 tokens"):
        engine.add_request(make_request("r", True, [1] * 8, 1))


@pytest.mark.parametrize(("stop", "on_text"), [(("a",), None), ((), print)])
def test_text_is_refused_where_there_is_no_tokenizer_that_makes_it(stop, on_text):
    engine = checksum_engine("bros")
    request = Request("r", RequestClass.BEST_EFFORT, [1], SamplingParams(4, stop=stop), 0.0)
    with pytest.raises(RequestRefused, match=r"refused: stop strings and text callbacks need .* tokenizer$"):
        engine.add_request(request, on_text)


def test_a_refused_request_that_comes_again_shorter_counts_as_what_it_becomes():
    engine = checksum_engine("bros", num_blocks=2, block_size=4)
    with pytest.raises(RequestRefused):
        engine.add_request(make_request("r", True, [1] * 9, 1))
    engine.add_request(shorter := make_request("r", True, [1] * 4, 1))
    run(engine, [])
    assert shorter.output_token_ids == alone(shorter)
    assert (summarise(engine.trace)["classes"]["rt"]["completed"], engine.trace.rejected) == (1, {})


def test_a_request_that_has_run_is_refused_by_the_next_engine():
    request = make_request("r", False, [1, 2], 3)
    run(checksum_engine("bros"), [request])
    with pytest.raises(RequestRefused, match="has run before"):
        checksum_engine("bros").add_request(request)


@pytest.mark.parametrize("token_id", [-1, 997])
def test_a_prompt_outside_the_vocabulary_is_refused_before_it_can_fail_a_batch(token_id):
    plain = checksum_engine("bros")
    engine = LLMEngine(plain.scheduler, plain.runner, plain.clock, vocab_size=997)
    engine.add_request(make_request("good", False, [0, 996], 1))
    with pytest.raises(RequestRefused, match="vocabulary of 0 to 996"):
        engine.add_request(make_request("bad", False, [1, token_id], 1))


# -- aborts -----------------------------------------------------------------------------------------------------------


def state_of(engine, request):
    kv, computed = engine.scheduler.kv, request.num_computed_tokens
    if request.status is RequestStatus.WAITING:
        return "preempted" if request.num_preemptions else "waiting"
    if kv.offloaded_tokens.get(request.request_id):
        return "swapped out" if not kv.num_device_blocks(request.request_id) else "partly overwritten"
    blocks = [kv.pool.blocks[block_id] for block_id in kv.block_table(request.request_id)]
    if any(block.rt is not None and block.be is not None for block in blocks):
        return "shared"
    if 0 < computed < request.num_prompt_tokens:
        return "prefilling"
    return "decoding" if request.last_step == engine.scheduler.step else "pending"


def abort_one_in(state, seed):
    """Runs a random workload until some request is in `state`, aborts it, and checks that the others are unaffected."""
    rng = random.Random(seed)
    engine = checksum_engine("bros" if seed % 2 else "bros-recompute", rng.randint(5, 14), 4, chunked_prefill=True,
                             max_num_batched_tokens=6)
    requests = random_requests(rng, 10, 5 * 4, 4, 0.3)
    pending, aborted = list(requests), None
    while pending or engine.has_unfinished:
        while pending and pending[0].arrival_s <= engine.clock.now_s():
            engine.add_request(pending.pop(0))
        if not engine.has_unfinished:
            engine.clock.sleep_until(pending[0].arrival_s)
            continue
        engine.step()
        found = [r for r in engine.scheduler.requests.values() if state_of(engine, r) == state]
        if found and aborted is None:
            aborted = found[0]
            assert engine.abort(aborted.request_id)
            assert not engine.abort(aborted.request_id), "a second abort finds nobody"
            assert engine.scheduler.kv.block_table(aborted.request_id) == []
        engine.scheduler.kv.check_integrity()
    for request in requests:
        assert request.output_token_ids == alone(request)[:len(request.output_token_ids)]
        assert (request.status is RequestStatus.ABORTED) == (request is aborted)
    kv = engine.scheduler.kv
    assert kv.num_used_blocks == 0
    assert not kv.offloaded_tokens
    assert not hasattr(kv, "host") or kv.host.num_unused == kv.host.num_blocks
    return aborted is not None


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "pending", "shared", "partly overwritten",
                                   "swapped out", "preempted"])
def test_an_abort_in_any_state_frees_everything_and_disturbs_nobody(state):
    reached = sum(abort_one_in(state, seed) for seed in range(80))
    assert reached > 0, f"no seed reached the state {state!r}"


# -- failing steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["bros", "bros-swap-block", "vllm-priority"])
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_a_failing_step_fails_its_batch_by_name_and_nobody_else(policy, seed):
    rng = random.Random(seed)
    engine = checksum_engine(policy, rng.randint(5, 20), 4)
    engine.runner = FailingRunner(engine.runner, rng)
    requests = random_requests(rng, 12, 20, 4, 0.0)
    for request in requests:
        engine.add_request(request)
    failures = []
    while engine.has_unfinished:
        try:
            engine.step()
        except StepFailed as failure:
            failures.append(failure)
        engine.scheduler.kv.check_integrity()
    named = [name for failure in failures for name in failure.failed]
    assert all(name in str(failure) for failure in failures for name in failure.failed)
    assert Counter(named) == Counter(r.request_id for r in requests if r.status is RequestStatus.FAILED)
    for request in requests:
        if request.status is not RequestStatus.FAILED:
            assert request.output_token_ids == alone(request)


@pytest.mark.parametrize("policy", ["bros", "tgi"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_in_the_runner_is_passed_on_and_leaves_the_engine_usable(policy, when):
    engine = checksum_engine(policy, max_num_seqs=2)
    requests = [make_request(f"r{i}", False, [i + 1, 2, 3], 4) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    execute = engine.runner.execute

    def interrupted(output):
        engine.runner.execute = execute
        if when == "after":
            execute(output)
        raise KeyboardInterrupt

    engine.step()
    engine.runner.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    check_accounts(engine)
    run(engine, [])
    failed = [request for request in requests if request.status is RequestStatus.FAILED]
    assert len(failed) == 2, "the batch that was interrupted, and nobody else"
    assert all(request.output_token_ids == alone(request) for request in requests if request not in failed)


def test_a_runner_that_returns_too_few_tokens_fails_its_batch():
    engine = checksum_engine("bros")
    for i in range(3):
        engine.add_request(make_request(f"r{i}", False, [i + 1], 2))
    engine.runner = SimpleNamespace(execute=lambda output: [1])
    with pytest.raises(StepFailed, match=r"returned 1 tokens for 3 requests.*r0, r1, r2"):
        engine.step()
    check_accounts(engine)
    assert not engine.has_unfinished


@pytest.mark.parametrize("wait_steps", [1, 3])
def test_a_stall_is_reported_after_twice_the_longest_wait_of_idle_steps_in_a_row(wait_steps):
    engine = checksum_engine("bros", be_max_wait_steps=wait_steps)
    schedule, longest = engine.scheduler.schedule, 2 * wait_steps + 2
    engine.add_request(make_request("r", False, [1], 3))
    for _ in range(2):
        engine.scheduler.schedule = lambda now_s: SchedulerOutput(0, now_s)
        for _ in range(longest):
            assert engine.step() == []
        engine.scheduler.schedule = schedule
        engine.step()  # it runs: the count begins anew
    engine.scheduler.schedule = lambda now_s: SchedulerOutput(0, now_s)
    for _ in range(longest):
        engine.step()
    with pytest.raises(EngineStalled, match=f"{longest + 1} steps"):
        engine.step()


def test_requests_that_fail_on_their_own_end_and_the_others_get_their_tokens():
    engine = checksum_engine("bros")
    requests = [make_request(f"r{i}", i == 1, [i + 1, 2], 3) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    execute = engine.runner.execute

    def one_fails(output):
        engine.runner.execute = execute
        token_ids = execute(output)
        index = output.requests.index(requests[2])
        raise RequestsFailed([*token_ids[:index], None, *token_ids[index + 1:]], {index: ValueError("its own fault")})

    engine.runner.execute = one_fails
    assert engine.step() == [requests[2]]
    assert (requests[2].status, str(requests[2].error)) == (RequestStatus.FAILED, "its own fault")
    check_accounts(engine)
    run(engine, [])
    assert [request.output_token_ids for request in requests] == [alone(requests[0]), alone(requests[1]), []]
    assert {name: why for step in engine.trace.steps for name, why in step.finished.items()} == {
        "r0": "length", "r1": "length", "r2": "failed"}


def test_a_failed_step_leaves_each_of_its_requests_the_reason():
    engine = checksum_engine("bros")
    engine.add_request(request := make_request("r", False, [1], 2))
    engine.runner = FailingRunner(engine.runner, random.Random(0), rate=2.0)
    with pytest.raises(StepFailed):
        engine.step()
    assert "copies" in str(request.error) or "forward pass" in str(request.error)


def test_a_policy_that_schedules_nobody_is_reported_instead_of_spinning():
    engine = checksum_engine("bros")
    engine.scheduler.pack = lambda now_s: None
    engine.add_request(make_request("r", False, [1], 1))

    def spin():
        for _ in range(10_000):
            engine.step()

    with pytest.raises(EngineStalled, match="free blocks"):
        spin()


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_nothing_grows_with_the_requests_served(monkeypatch):
    monkeypatch.setattr("bros_ref.engine.llm_engine.KEEP_ENDED", 5)
    engine = byte_engine()
    engine.trace = None

    def serve_some(first, count):
        for i in range(first, first + count):
            engine.add_request(make_request(f"r{i}", i % 2 == 0, [1 + i % 7], 30), lambda request, _: (
                engine.abort(request.request_id) if request.request_id.endswith("3") else
                1 / 0 if request.request_id.endswith("5") else None))
            if i % 10 == 9:
                run(engine, [])
        return {name: len(value) for name, value in vars(engine).items() if hasattr(value, "__len__")}

    assert serve_some(0, 40) == serve_some(40, 40)
    assert len(engine.streams) == 5
    assert len(engine.callback_errors) <= 5


def test_an_id_may_come_again_once_its_request_has_ended_and_no_trace_holds_it():
    engine = byte_engine()
    with_trace = byte_engine()
    for one in (engine, with_trace):
        one.add_request(make_request("r", False, [1], 3))
        with pytest.raises(RequestRefused, match="used before"):
            one.add_request(make_request("r", False, [1], 3))
        run(one, [])
    with pytest.raises(RequestRefused, match="used before"):
        with_trace.add_request(make_request("r", False, [1], 3))
    engine.trace = None
    engine.add_request(again := make_request("r", False, [1], 3))
    run(engine, [])
    assert again.output_token_ids == alone(again)


def test_an_id_that_comes_again_keeps_its_text_when_its_first_life_is_forgotten(monkeypatch):
    monkeypatch.setattr("bros_ref.engine.llm_engine.KEEP_ENDED", 2)
    engine = byte_engine()
    engine.trace = None
    engine.add_request(make_request("r", False, [1], 1))
    run(engine, [])
    engine.add_request(make_request("r", False, [1], 50))
    for i in range(4):
        engine.add_request(make_request(f"other{i}", False, [1], 1))
    while len(engine.scheduler.requests) > 1:
        engine.step()
    assert "r" in engine.streams
    run(engine, [])


def test_a_refused_request_can_be_shortened_and_arrives_when_it_is_accepted():
    engine = checksum_engine("bros", num_blocks=2, block_size=4)
    long = Request("r", RequestClass.REAL_TIME, [1] * 9, slo=SLO(1.0, 1.0))
    with pytest.raises(RequestRefused):
        engine.add_request(long)
    assert (long.arrival_s, long.deadline_s) == (None, math.inf)
    assert engine.trace.requests["r"].arrival_s == 0.0


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_a_wall_clock_sleeps_however_long_it_takes(monkeypatch):
    """The operating system refuses to sleep for centuries, so a long sleep is several."""
    now_s, naps = 5.0, []

    def sleep(duration_s):
        nonlocal now_s
        naps.append(duration_s)
        now_s += duration_s

    monkeypatch.setattr("bros_ref.clock.time", SimpleNamespace(perf_counter=lambda: now_s, sleep=sleep))
    clock = WallClock()
    clock.sleep_until(-1.0)
    assert naps == []
    clock.sleep_until(2.5e6)
    assert naps == [1e6, 1e6, 5e5]


def test_a_token_that_ends_the_text_is_no_part_of_it():
    engine = byte_engine()
    engine.add_request(request := make_request("r", False, [1], 9))
    engine.scheduler.eos_token_ids = {alone(request)[0]}
    run(engine, [])
    assert (request.status, len(request.output_token_ids)) == (RequestStatus.FINISHED_STOP, 1)
    assert engine.streams["r"].text == ""


# -- the serving loop -------------------------------------------------------------------------------------------------


def to_request(item):
    return Request(item.request_id, item.request_class, [1] * item.prompt_tokens,
                   SamplingParams(max_tokens=item.output_tokens, ignore_eos=True), item.arrival_s, item.slo)


def closed_loop(num_batches):
    prompt_tokens, output_tokens = uniform_lengths(1, 4), uniform_lengths(40, 40)  # enough for some to be text
    return ClosedLoopBatches(3, prompt_tokens, output_tokens, np.random.default_rng(0), num_batches=num_batches)


def test_a_closed_loop_goes_on_when_a_callback_aborts_its_requests():
    engine = byte_engine()
    loop = closed_loop(num_batches=3)
    serve(engine, Workload(closed_loops=[loop]), to_request, on_text=lambda request, _: engine.abort("be-4"))
    assert loop.num_started == 3
    assert engine.trace.ended_outside.keys() == {"be-4"}
    assert summarise(engine.trace)["classes"]["be"]["completed"] == 8


def test_the_serving_loop_tells_which_steps_failed_and_why():
    engine = checksum_engine("bros")
    engine.runner = FailingRunner(engine.runner, random.Random(1), rate=0.3)
    failures = serve(engine, Workload(closed_loops=[closed_loop(num_batches=4)]), to_request)
    assert failures
    assert all("forward pass" in str(failure) or "copies" in str(failure) for failure in failures)
    ended = summarise(engine.trace)["classes"]["be"]
    assert ended["failed"] == sum(len(failure.failed) for failure in failures)
    assert ended["completed"] + ended["failed"] == 12


def test_an_interrupt_of_the_serving_loop_brings_the_trace_and_the_failures_so_far():
    engine = checksum_engine("bros")
    engine.runner = FailingRunner(engine.runner, random.Random(1), rate=0.3)

    def interrupt_after_a_failure(ended):
        if any("failed" in step.finished.values() for step in engine.trace.steps):
            raise KeyboardInterrupt

    with pytest.raises(ServeInterrupted, match="serving was interrupted") as interrupted:
        serve(engine, Workload(closed_loops=[closed_loop(num_batches=4)]), to_request,
              on_step=interrupt_after_a_failure)
    assert interrupted.value.trace is engine.trace
    in_trace = [name for step in engine.trace.steps for name, why in step.finished.items() if why == "failed"]
    assert [name for failure in interrupted.value.failures for name in failure.failed] == in_trace != []


def test_the_serving_loop_sleeps_until_the_next_arrival_or_until_it_is_to_end():
    engine = checksum_engine("bros")
    items = [WorkloadItem(arrival_s, RequestClass.BEST_EFFORT, 1, 1) for arrival_s in (0.5, 2.0)]
    serve(engine, Workload(items), to_request, until_s=1.5)
    assert [step.start_s for step in engine.trace.steps] == [0.5]
    assert engine.clock.now_s() == 1.5


def test_the_serving_loop_goes_on_behind_requests_that_are_refused():
    engine = checksum_engine("bros", num_blocks=2)
    loop = closed_loop(num_batches=3)
    serve(engine, Workload(closed_loops=[loop]), to_request)
    assert loop.num_started == 3
    assert len(engine.trace.rejected) == 9
    assert not engine.trace.steps


def test_the_bounds_of_one_class_serve_that_class_alone():
    rt = WorkloadItem(0.0, RequestClass.REAL_TIME, 1, 1, SLO(1.0, 1.0))
    be = WorkloadItem(0.0, RequestClass.BEST_EFFORT, 1, 1)
    assert [keep_class([rt, be], policy) for policy in ("bros", "rt-only", "be-only")] == [[rt, be], [rt], [be]]


@pytest.mark.parametrize(("until_s", "num_steps"), [(0.0, 0), (1e-9, 1), (math.inf, 3)])
def test_the_serving_loop_begins_no_step_at_the_time_at_which_it_is_to_end(until_s, num_steps):
    engine = checksum_engine("bros")
    loop = ClosedLoopBatches(1, uniform_lengths(1, 1), uniform_lengths(3, 3), np.random.default_rng(0), num_batches=1)
    serve(engine, Workload(closed_loops=[loop]), to_request, until_s)
    assert len(engine.trace.steps) == num_steps


# -- determinism and the trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_trace_replays_to_the_very_pool_and_the_same_seed_gives_the_same_trace(policy):
    def one_run():
        rng = random.Random(7)
        engine = checksum_engine(policy, 9, 4, chunked_prefill=True, max_num_batched_tokens=8)
        snapshots, step = [], engine.step

        def stepping():
            before = len(engine.trace.steps)
            original = engine.runner.execute

            def spy(output):
                snapshots.append(engine.scheduler.kv.snapshot())
                return original(output)

            engine.runner.execute = spy
            try:
                return step()
            finally:
                engine.runner.execute = original
                assert len(engine.trace.steps) - before in (0, 1)

        engine.step = stepping
        run(engine, random_requests(rng, 12, 36, 4, 0.4))
        return engine.trace, snapshots

    trace, snapshots = one_run()
    assert list(trace.pools()) == snapshots
    again, _ = one_run()
    for record in (*trace.steps, *again.steps):
        record.schedule_s = 0.0
    assert trace == again


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-5, 1e-3])
@pytest.mark.parametrize("top_p", [5e-324, 0.5, 1.0])
def test_the_lowest_temperatures_are_greedy_and_fail_no_batch(temperature, top_p):
    engine = checksum_engine("bros")
    cold = Request("cold", RequestClass.BEST_EFFORT, [1, 2, 3], SamplingParams(6, temperature, top_p))
    engine.add_request(cold)
    run(engine, [])
    assert cold.output_token_ids == alone(cold)


def test_a_request_without_a_seed_is_given_one_that_follows_from_the_engines():
    given = []  # to those that sample; a greedy one needs none
    for seed in (3, 3, 4):
        plain = checksum_engine("bros")
        engine = LLMEngine(plain.scheduler, plain.runner, plain.clock, trace=plain.trace, seed=seed)
        for name, own in (("a", None), ("b", None), ("own", 5)):
            params = SamplingParams(max_tokens=1, temperature=1.0, seed=own)
            engine.add_request(Request(name, RequestClass.BEST_EFFORT, [1], params, 0.0))
        engine.add_request(make_request("greedy", False, [1], 1))
        assert engine.trace.requests.pop("greedy").seed is None
        assert [record.seed for record in engine.trace.requests.values()][-1] == 5
        given.append([record.seed for record in engine.trace.requests.values()])
    assert given[0] == given[1] != given[2]
    assert len({*given[0], *given[2]}) == 5


def test_a_step_that_completes_no_prompt_asks_for_no_logits():
    engine = checksum_engine("bros", chunked_prefill=True, max_num_batched_tokens=2)
    engine.add_request(make_request("r", False, [1, 2, 3], 1))
    model, asked = engine.runner.runner.model, []
    forward = model.forward

    def spy(token_ids, positions, kv, meta, logits_rows):
        asked.append(logits_rows)
        return forward(token_ids, positions, kv, meta, logits_rows)

    model.forward = spy
    run(engine, [])
    assert [(rows.tolist(), rows.dtype) for rows in asked] == [([], torch.long), ([0], torch.long)]


def test_logits_that_are_not_finite_fail_their_own_request_by_name():
    engine = checksum_engine("bros")
    for name in ("good", "bad"):
        engine.add_request(make_request(name, False, [1, 2], 4))
    runner = engine.runner.runner
    compute = runner.compute

    def damaged(work):
        logits = compute(work).clone()
        logits[1, 5] = math.inf
        return logits

    runner.compute = damaged
    [bad] = engine.step()
    assert (bad.request_id, bad.status, bad.output_token_ids) == ("bad", RequestStatus.FAILED, [])
    assert str(bad.error) == ("request 'bad': the model's logits after 2 tokens are not finite, so there is no next "
                              "token; check the weights, or use a wider dtype")
    assert len(engine.scheduler.requests["good"].output_token_ids) == 1


@pytest.mark.parametrize("policy", ["tgi", "bros"])
def test_sampled_tokens_depend_on_the_request_alone(policy):
    """One-hot logits at temperature 40 are nearly uniform: only the seed and the position decide."""
    outputs = []
    for others in (0, 5):
        engine = checksum_engine(policy, num_blocks=30)
        params = SamplingParams(max_tokens=12, temperature=40.0, top_p=0.9, seed=3)
        request = Request("sampled", RequestClass.BEST_EFFORT, [1, 2, 3], params)
        engine.add_request(request)
        for i in range(others):
            engine.add_request(make_request(f"other{i}", i % 2 == 0, [i + 1], 9))
        run(engine, [])
        outputs.append(request.output_token_ids)
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 6
