"""One small decision for each line of BROS's rules: whoever deletes the line, or drops a term of it, sees a test fail.

All times are those of TOY_LATENCY: 10 ms per step, 1 ms per token, 0.01 ms per token pair of a prefill and per context
token of a decode; 0.5 ms to copy a token back from the host.
"""

import math

import pytest
from decisions import EASY, Decider

from bros_ref.request import SLO, RequestStatus
from bros_ref.trace import BATCH_CAP, DEADLINE, NO_BLOCKS, TOKEN_BUDGET

# -- the order of best-effort -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("aging", "first"), [(0.0, "be-short"), (1.0, "be-short"), (2.0, "be-long")])
def test_a_step_of_waiting_is_worth_the_tokens_that_are_configured(aging, first):
    """12 tokens to restore after 4 steps of waiting, against 8 after one: equal at 4/3 tokens per step."""
    decider = Decider("bros", be_aging_tokens_per_step=aging)
    long = decider.add("be-long", prompt_tokens=12)
    decider.add("be-short", prompt_tokens=8)
    decider.step()
    for name in ("be-long", "be-short"):
        assert decider.kv.swap_out(name)
    long.last_step -= 3
    assert next(iter(decider.step())) == first


def test_without_anything_to_restore_the_longest_waiting_goes_first():
    decider = Decider("bros")
    decider.add("be0", prompt_tokens=4)
    late = decider.add("be1", prompt_tokens=4)
    decider.step()
    late.last_step -= 1
    assert list(decider.step()) == ["be1", "be0"]


# -- the deadline check -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("safety", "residual_s", "admitted"), [
    (1.0, 0.0605, True), (1.0, 0.0595, False), (1.5, 0.0905, True), (1.5, 0.0895, False)])
def test_copies_back_from_the_host_must_fit_the_residual_time(safety, residual_s, admitted):
    """120 tokens take 60 ms to copy back; computing takes 13.2 ms, so copies alone decide."""
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=200)
    decider.add("be0", prompt_tokens=120)
    decider.step()
    assert decider.kv.swap_out("be0")
    decider.latency.safety = safety
    decider.add("rt0").deadline_s = decider.now_s + residual_s
    assert ("be0" in decider.decide()) is admitted
    if not admitted:
        assert decider.output.left_out == {"be0": DEADLINE}


def test_copies_of_all_requests_of_the_step_count():
    """Two times 40 tokens: each takes 20 ms to copy back, both take 40 ms."""
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=200)
    for name in ("be0", "be1"):
        decider.add(name, prompt_tokens=40)
    decider.step()
    for name in ("be0", "be1"):
        assert decider.kv.swap_out(name)
    decider.add("rt0").deadline_s = decider.now_s + 0.035
    assert list(decider.decide()) == ["rt0", "be0"]
    assert decider.output.features.restored_tokens == 40
    assert decider.output.predicted_s == pytest.approx(0.020)


@pytest.mark.parametrize(("safety", "admitted"), [(1.0, True), (1.25, False)])
def test_a_decode_is_checked_with_the_safety_factor(safety, admitted):
    """RT and BE take 13.0 ms together, and 16.25 ms with a quarter on top; 15 ms are left."""
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=200)
    decider.add("be0", prompt_tokens=100)
    decider.step()
    decider.latency.safety = safety
    decider.add("rt0").deadline_s = decider.now_s + 0.015
    assert ("be0" in decider.decide()) is admitted


def test_a_batch_of_decodes_costs_their_contexts():
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=300)
    decider.add("be0", prompt_tokens=100)
    decider.add("be1", prompt_tokens=50)
    decider.step()
    assert decider.decide() == {"be0": 1, "be1": 1}
    assert decider.output.features.decode_contexts == 150
    assert decider.output.predicted_s == pytest.approx(0.010 + 2 * 0.001 + 150 * 0.00001)


@pytest.mark.parametrize(("safety", "residual_s"), [(1.0, 0.0120), (1.5, 0.0175)])
def test_pending_best_effort_ends_where_not_even_one_decode_fits(safety, residual_s):
    """The RT takes 11.01 ms and a decode 1 ms and more, times the safety factor: a shorter context would not help."""
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=300)
    rt = decider.add("rt0", prompt_tokens=1)
    for i in range(3):
        decider.add(f"be{i}", prompt_tokens=1)
    decider.step()
    decider.latency.safety = safety
    rt.deadline_s = decider.now_s + residual_s
    decider.add("be-new", prompt_tokens=1)
    assert decider.decide() == {"rt0": 1}
    assert decider.output.left_out == {"be0": DEADLINE}
    assert decider.output.num_behind == 3


def test_pending_best_effort_goes_on_behind_one_that_takes_too_long_while_a_decode_fits():
    """12.5 ms are left: not enough for a decode behind 200 tokens of context, but for one behind a single token."""
    decider = Decider("bros", num_blocks=200, max_num_batched_tokens=300)
    rt = decider.add("rt0", prompt_tokens=1)
    decider.add("be-long", prompt_tokens=200)
    decider.add("be-short", prompt_tokens=1)
    decider.step()
    rt.deadline_s = decider.now_s + 0.0125
    assert decider.decide() == {"rt0": 1, "be-short": 1}
    assert decider.output.left_out == {"be-long": DEADLINE}


def test_who_stands_behind_a_refused_head_is_counted():
    decider = Decider("bros", num_blocks=4)
    for i in range(4):
        decider.add(f"be{i}", prompt_tokens=12)
    assert decider.decide() == {"be0": 12}
    assert decider.output.left_out == {"be1": NO_BLOCKS}
    assert decider.output.num_behind == 2
    assert (decider.output.num_running, decider.output.num_waiting) == (1, 3)


def test_the_batch_cap_falls_when_a_deadline_binds_and_grows_again_when_none_does():
    decider = Decider("bros", base_batch_cap=1, max_num_seqs=8, num_blocks=400, max_num_batched_tokens=1000)
    caps = []
    for step in range(7):
        if step == 3:
            rt = decider.add("rt0", slo=SLO(0.05, 9.0))
            decider.add("rt1", prompt_tokens=100, slo=SLO(9.0, 9.0))
            assert rt.deadline_s < math.inf
        decider.step()
        caps.append(decider.scheduler.max_batch_size)
    assert caps == [1, 2, 4, 8, 1, 2, 4]


# -- a victim leaves the batch ----------------------------------------------------------------------------------------


def test_after_a_victim_has_left_the_batch_the_step_is_that_of_those_who_remain():
    """vLLM's policy preempts requests that are in the batch already."""
    decider = Decider("vllm-priority", num_blocks=4, max_num_batched_tokens=64, chunked_prefill=True)
    decider.add("be0", prompt_tokens=5)
    decider.step()
    decider.add("rt0", prompt_tokens=8)
    decider.step()
    assert decider.decide() == {"rt0": 1}
    assert decider.output.preempted == {"be0": "recompute"}
    assert decider.scheduler.executing_s == pytest.approx(0.010 + 0.001 + 8 * 0.00001)
    assert decider.output.predicted_s == pytest.approx(0.010 + 0.001 + 8 * 0.00001)
    assert decider.output.features.decode_contexts == 8


# -- real-time: the queue, the late, the newcomers --------------------------------------------------------------------


def test_no_newcomer_passes_a_real_time_request_that_was_refused():
    """The second does not fit before the first one's deadline; the third would."""
    decider = Decider("bros", num_blocks=200, max_num_batched_tokens=1000)
    decider.add("rt0", prompt_tokens=4, slo=SLO(0.1, 0.1))
    decider.add("rt-long", prompt_tokens=80, slo=SLO(9.0, 9.0))
    decider.add("rt-short", prompt_tokens=4, slo=SLO(9.5, 9.5))
    assert decider.decide() == {"rt0": 4}
    assert decider.output.left_out == {"rt-long": DEADLINE}
    assert decider.output.num_behind == 1


def test_a_pending_real_time_request_passes_a_newcomer_that_was_refused():
    decider = Decider("bros", num_blocks=200, max_num_batched_tokens=1000)
    pending = decider.add("rt-pending", prompt_tokens=4, slo=SLO(99.0, 99.0))
    decider.step()
    decider.add("rt0", prompt_tokens=4, slo=SLO(0.1, 0.1))
    decider.add("rt-long", prompt_tokens=80, slo=SLO(9.0, 9.0))
    assert pending.deadline_s > decider.now_s + 9.0
    assert decider.decide() == {"rt0": 4, "rt-pending": 1}


@pytest.mark.parametrize(("waited", "admitted"), [(4, []), (5, ["rt-late0"])])
def test_of_the_late_who_waited_too_long_one_per_step_is_exempt_from_the_budget(waited, admitted):
    """N = 4. Both late prompts take 0.2 s and more, and 0.1 s are left."""
    decider = Decider("bros", num_blocks=400, max_num_batched_tokens=1000, be_max_wait_steps=4)
    decider.add("rt-on-time", slo=SLO(0.1, 9.0))
    for i in range(2):
        late = decider.add(f"rt-late{i}", prompt_tokens=150, slo=SLO(0.001, 1.0))
        late.last_step = decider.scheduler.step + 1 - waited
    assert list(decider.decide()) == ["rt-on-time", *admitted]


def test_an_exempt_late_request_is_exempt_from_the_token_budget_too():
    decider = Decider("bros+chunks", num_blocks=400, max_num_batched_tokens=32, be_max_wait_steps=4)
    decider.add("rt-on-time", prompt_tokens=32, slo=SLO(9.0, 9.0))
    late = decider.add("rt-late", prompt_tokens=64, slo=SLO(0.001, 1.0))
    assert decider.decide() == {"rt-on-time": 32}
    decider.compute()
    decider.add("rt-next", prompt_tokens=31, slo=SLO(9.0, 9.0))
    late.last_step -= 4
    assert decider.decide() == {"rt-on-time": 1, "rt-next": 31, "rt-late": 16}, "min_chunk_tokens, beyond the 32"


@pytest.mark.parametrize(("safety", "prompt_tokens", "admitted"), [
    (1.0, 40, True), (1.0, 60, False), (1.5, 18, True), (1.5, 28, False)])
def test_best_effort_leaves_time_for_a_typical_newcomer(safety, prompt_tokens, admitted):
    """A typical RT: 20 tokens, due after 0.1 s. They take 32 ms alone, so an iteration may take 68 ms; with a safety
    factor of 1.5 they take 48 ms, so an iteration may be predicted to take 34.7 ms."""
    decider = Decider("bros", num_blocks=400, max_num_batched_tokens=1000)
    decider.add("rt-typical", prompt_tokens=20, max_tokens=2, slo=SLO(0.1, 9.0))
    decider.step()
    decider.latency.safety = safety
    decider.add("be0", prompt_tokens=prompt_tokens)
    assert ("be0" in decider.decide()) is admitted


@pytest.mark.parametrize(("safety", "ttft_s"), [(1.0, 0.040), (1.5, 0.061)])
def test_a_typical_newcomer_that_no_iteration_can_serve_bounds_nobody(safety, ttft_s):
    """20 tokens take 32 ms, or 48 ms with the safety factor; the shortest iteration takes 11 ms, or 16.5 ms."""
    decider = Decider("bros", num_blocks=400, max_num_batched_tokens=1000)
    decider.add("rt-typical", prompt_tokens=20, max_tokens=2, slo=SLO(ttft_s, 9.0))
    decider.step()
    decider.latency.safety = safety
    decider.add("be0", prompt_tokens=200)
    assert "be0" in decider.decide()


def test_the_typical_newcomer_follows_those_that_arrive_and_no_preemption_counts():
    decider = Decider("bros")
    decider.add("rt0", prompt_tokens=10, slo=SLO(1.0, 1.0))
    again = decider.add("rt1", prompt_tokens=20, slo=SLO(2.0, 1.0))
    typical = (10 + 0.1 * 10, 1.0 + 0.1 * 1.0)
    scheduler = decider.scheduler
    assert (scheduler._typical_prompt_tokens, scheduler._typical_ttft_s) == pytest.approx(typical)
    decider.step()
    scheduler.recompute(again)
    assert (scheduler._typical_prompt_tokens, scheduler._typical_ttft_s) == pytest.approx(typical)


@pytest.mark.parametrize(("slowdown", "safety", "num_be"), [
    (None, 1.0, 6), (1.0, 1.0, 0), (1.35, 1.0, 3), (1.35, 2.0, 3), (1.55, 1.0, 5)])
def test_rt_slowdown_bounds_what_best_effort_adds_to_an_iteration_of_real_time(slowdown, safety, num_be):
    """Each BE decode adds 1.01 ms, and (slowdown - 1) * 10 ms may be added."""
    decider = Decider("bros", rt_slowdown=slowdown)
    for i in range(6):
        decider.add(f"be{i}")
    decider.step()
    decider.latency.safety = safety
    decider.add("rt0", prompt_tokens=4)
    assert len(decider.decide()) == 1 + num_be


def test_rt_slowdown_counts_from_what_real_time_takes_with_its_copies():
    """Its copies take 60 ms, so the iteration has that long for BE anyhow, and 1 ms more."""
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=200, rt_slowdown=1.1)
    decider.add("be0", prompt_tokens=1)
    decider.add("rt0", prompt_tokens=120)
    decider.step()
    assert decider.kv.swap_out("rt0")
    assert decider.decide() == {"rt0": 1, "be0": 1}
    decider.compute()
    assert decider.decide() == {"rt0": 1}, "nothing to copy: a decode of BE would be 1.02 ms, 1 ms is allowed"


def test_rt_slowdown_bounds_nobody_where_no_real_time_request_runs():
    decider = Decider("bros", rt_slowdown=1.0)
    for i in range(4):
        decider.add(f"be{i}")
    assert len(decider.step()) == 4
    assert len(decider.step()) == 4


# -- tokens, the end of a request -------------------------------------------------------------------------------------


def test_a_decode_takes_a_token_of_the_budget():
    decider = Decider("bros", max_num_batched_tokens=2)
    for i in range(3):
        decider.add(f"be{i}")
    assert len(decider.step()) == 2
    assert decider.output.left_out == {"be2": TOKEN_BUDGET}


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_an_end_token_ends_a_request_unless_it_is_ignored(ignore_eos):
    decider = Decider("bros")
    request = decider.add("be0", max_tokens=3)
    request.sampling = type(request.sampling)(max_tokens=3, ignore_eos=ignore_eos)
    decider.scheduler.eos_token_ids = frozenset({7})
    decider.step()
    assert request.status is (RequestStatus.RUNNING if ignore_eos else RequestStatus.FINISHED_STOP)
    decider.step(), decider.step()
    assert request.status is (RequestStatus.FINISHED_LENGTH if ignore_eos else RequestStatus.FINISHED_STOP)


def test_the_average_iteration_starts_at_the_first_and_follows_slowly():
    decider = Decider("bros")
    decider.add("be0", prompt_tokens=20)
    decider.step()
    first_s = decider.output.predicted_s
    assert decider.scheduler.iteration_s == pytest.approx(first_s)
    decider.step()
    second_s = decider.output.predicted_s
    assert decider.scheduler.iteration_s == pytest.approx(first_s + 0.1 * (second_s - first_s))


# -- the last seat ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("safety", "residual_s", "second"), [
    (1.0, 0.021, "rt1"), (1.0, 0.025, "be0"), (1.5, 0.032, "rt1"), (1.5, 0.037, "be0")])
def test_the_slackest_leaves_the_last_seat_only_if_it_can_wait_two_iterations(safety, residual_s, second):
    """An iteration takes 11 ms on average: two of them 22 ms, or 33 ms with the safety factor."""
    decider = Decider("bros", max_num_seqs=2)
    decider.add("be0")
    decider.step(), decider.step()
    assert decider.scheduler.iteration_s == pytest.approx(0.011, rel=0.01)
    decider.latency.safety = safety
    decider.add("rt0").deadline_s = decider.now_s + 0.020
    decider.add("rt1").deadline_s = decider.now_s + residual_s
    assert list(decider.decide()) == ["rt0", second]


def test_the_one_that_stood_aside_gets_the_seat_back_if_no_best_effort_fits_within_its_own_time():
    """The BE does not fit before the deadline; the seat must not stay empty, whatever is reserved for newcomers."""
    decider = Decider("bros", max_num_seqs=2, num_blocks=200, max_num_batched_tokens=1000)
    decider.add("rt0", slo=SLO(0.05, 9.0))
    decider.add("rt1", prompt_tokens=20, slo=SLO(9.0, 9.0))
    decider.add("be0", prompt_tokens=100)
    assert list(decider.decide()) == ["rt0", "rt1"]
    assert decider.output.left_out == {"be0": DEADLINE}
    assert BATCH_CAP not in decider.output.left_out.values()


def test_no_real_time_request_stands_aside_where_there_is_no_best_effort():
    decider = Decider("bros", max_num_seqs=2)
    for i in range(2):
        decider.add(f"rt{i}", slo=EASY)
    assert list(decider.decide()) == ["rt0", "rt1"]
    assert not decider.output.left_out


# -- starving best-effort ---------------------------------------------------------------------------------------------


def starving(decider, *names):
    """Has these BE wait as long as `be_max_wait_steps` says, to the step: they starve in the next one."""
    for name in names:
        decider.scheduler.requests[name].last_step = decider.scheduler.step - decider.scheduler.config.be_max_wait_steps


@pytest.mark.parametrize("is_late", [False, True])
def test_a_seat_is_kept_for_a_starving_request_whether_real_time_is_on_time_or_late(is_late):
    decider = Decider("bros", max_num_seqs=2, be_max_wait_steps=4)
    decider.add("be0")
    decider.step()
    for i in range(2):  # alone each takes 11 ms: neither can wait two iterations
        decider.add(f"rt{i}").deadline_s = decider.now_s + (0.001 if is_late else 0.015)
    assert list(decider.decide()) == ["rt0", "rt1"]
    starving(decider, "be0")
    assert list(decider.decide()) == ["rt0", "be0"]


def test_one_starving_request_per_step_is_exempt_from_the_deadlines():
    """The RT leaves half a millisecond, less than a decode takes."""
    decider = Decider("bros", be_max_wait_steps=4)
    rt = decider.add("rt0")
    for i in range(3):
        decider.add(f"be{i}")
    decider.step()
    starving(decider, "be0", "be1", "be2")
    decider.scheduler.requests["be1"].last_step -= 1
    rt.deadline_s = decider.now_s + 0.0115
    assert list(decider.step()) == ["rt0", "be1"], "the longest-waiting"
    rt.deadline_s = decider.now_s + 0.0115
    assert list(decider.step()) == ["rt0", "be0"], "the next"


def test_a_starving_request_is_exempt_from_the_token_budget():
    decider = Decider("bros", max_num_batched_tokens=1, be_max_wait_steps=4)
    decider.add("be0")
    decider.step()
    decider.add("rt0")
    assert decider.step() == {"rt0": 1}
    assert decider.output.left_out == {"be0": TOKEN_BUDGET}
    starving(decider, "be0")
    assert decider.step() == {"rt0": 1, "be0": 1}


@pytest.mark.parametrize(("waited", "is_admitted"), [(4, False), (5, True)])
def test_a_pending_request_starves_from_the_step_after_n(waited, is_admitted):
    decider = Decider("bros", be_max_wait_steps=4)
    request = decider.add("be0")
    decider.step()
    decider.add("rt0").deadline_s = decider.now_s + 0.0115
    request.last_step = decider.scheduler.step + 1 - waited
    assert ("be0" in decider.decide()) is is_admitted


@pytest.mark.parametrize(("waited", "be_holds_kv", "is_admitted"), [
    (4, False, False), (5, False, True), (5, True, False)])
def test_the_head_of_the_queue_starves_if_no_best_effort_request_holds_kv(waited, be_holds_kv, is_admitted):
    decider = Decider("bros", be_max_wait_steps=4, num_blocks=200, max_num_batched_tokens=1000)
    if be_holds_kv:
        decider.add("be-pending")
        decider.step()
    head = decider.add("be-head", prompt_tokens=100)
    decider.add("rt0").deadline_s = decider.now_s + 0.03
    head.last_step = decider.scheduler.step + 1 - waited
    assert ("be-head" in decider.decide()) is is_admitted


def test_a_starving_request_that_ran_is_not_tried_again_in_its_turn():
    decider = Decider("bros", be_max_wait_steps=4)
    for i in range(2):
        decider.add(f"be{i}")
    decider.step()
    starving(decider, "be0")
    assert decider.step() == {"be0": 1, "be1": 1}
    assert not decider.output.left_out


def test_copies_back_do_not_keep_a_starving_request_out():
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=200, be_max_wait_steps=4)
    decider.add("be0", prompt_tokens=120)
    decider.step()
    assert decider.kv.swap_out("be0")
    decider.add("rt0").deadline_s = decider.now_s + 0.05
    assert decider.decide() == {"rt0": 1}
    starving(decider, "be0")
    assert decider.decide() == {"rt0": 1, "be0": 1}


def test_no_newcomer_passes_pending_best_effort_that_finds_no_blocks():
    """The swapped out one needs four blocks, and two are free."""
    decider = Decider("bros", num_blocks=4)
    decider.add("be-pending", prompt_tokens=12)
    decider.step()
    assert decider.kv.swap_out("be-pending")
    decider.add("rt0", prompt_tokens=8)
    decider.add("be-new", prompt_tokens=4)
    assert decider.decide() == {"rt0": 8}
    assert decider.output.left_out == {"be-pending": NO_BLOCKS}


# -- who is late ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offloaded", "context", "safety", "alone_s"), [
    (False, 100, 1.0, 0.0120), (False, 100, 1.5, 0.0180), (True, 100, 1.0, 0.0500), (True, 100, 1.5, 0.0750),
    (True, 8, 1.0, 0.01108)])
def test_a_request_is_late_if_not_even_alone_it_would_be_on_time(offloaded, context, safety, alone_s):
    """A decode behind `context` tokens, or the copies that it needs if they take longer."""
    for residual_s, is_late in ((alone_s - 1e-4, True), (alone_s + 1e-4, False)):
        decider = Decider("bros", num_blocks=100, max_num_batched_tokens=200)
        rt = decider.add("rt0", prompt_tokens=context)
        decider.step()
        if offloaded:
            assert decider.kv.swap_out("rt0")
        decider.latency.safety = safety
        rt.deadline_s = decider.now_s + residual_s
        decider.decide()
        bound_s = decider.scheduler.output.step_budget_s
        assert (bound_s is None) is is_late, f"{residual_s}: the late set no bound"


def test_all_late_newcomers_are_tried_and_the_ended_are_skipped():
    decider = Decider("bros", max_num_seqs=4)
    late = [decider.add(f"rt{i}", slo=SLO(0.001, 1.0)) for i in range(4)]
    decider.abort(late[0])
    assert decider.decide() == {"rt1": 1, "rt2": 1, "rt3": 1}


def test_late_newcomers_that_ended_in_their_queue_are_skipped():
    decider = Decider("bros", max_num_seqs=1)
    late = [decider.add(f"rt{i}", max_tokens=1, slo=SLO(0.001, 1.0)) for i in range(3)]
    assert decider.step() == {"rt0": 1}
    decider.abort(late[1])
    assert decider.step() == {"rt2": 1}


def test_slack_is_what_is_left_after_one_average_iteration():
    decider = Decider("bros")
    decider.add("rt0", slo=SLO(1.0, 0.5))
    decider.step()
    decider.decide()
    assert decider.output.slack_s == {"rt0": pytest.approx(0.5 - decider.scheduler.iteration_s)}


def test_newcomers_and_pending_real_time_are_one_order():
    decider = Decider("bros")
    for name, residual_s in (("rt-b", 2.0), ("rt-d", 4.0)):
        decider.add(name).deadline_s = residual_s
    decider.step()
    decider.scheduler.requests["rt-b"].deadline_s = 4.0
    decider.scheduler.requests["rt-d"].deadline_s = 2.0
    decider.add("rt-c", slo=SLO(3.0 - decider.now_s, 1.0))
    decider.add("rt-a", slo=SLO(1.0 - decider.now_s, 1.0))
    assert list(decider.decide()) == ["rt-a", "rt-d", "rt-c", "rt-b"]


# -- what the output says ---------------------------------------------------------------------------------------------


def test_the_output_of_a_step_without_deadlines_names_no_budget_and_the_last_reason():
    decider = Decider("bros", num_blocks=4, max_num_seqs=2)
    for i in range(3):
        decider.add(f"be{i}", prompt_tokens=4)
    decider.decide()
    assert decider.output.step_budget_s is None
    assert decider.output.binding == BATCH_CAP
    assert decider.output.num_used_blocks == 2


def test_a_recomputed_request_is_counted_and_starts_over():
    decider = Decider("bros")
    request = decider.add("be0", prompt_tokens=10)
    decider.step()
    decider.scheduler.output.recomputed_tokens = 0
    decider.scheduler.recompute(request)
    assert decider.scheduler.output.recomputed_tokens == 10
    assert (request.num_preemptions, request.num_computed_tokens, request.status) == (1, 0, RequestStatus.WAITING)
    assert decider.step() == {"be0": 11}


def test_times_of_the_first_and_the_last_token_are_kept():
    decider = Decider("bros")
    request = decider.add("be0")
    decider.step()
    first_s = decider.now_s
    decider.step()
    assert (request.first_token_s, request.last_token_s) == (first_s, decider.now_s)
    assert first_s < decider.now_s


def test_a_restart_makes_everybody_wait_with_nothing_computed():
    decider = Decider("bros", max_num_seqs=2)
    running = [decider.add(f"be{i}", prompt_tokens=3) for i in range(2)]
    waiting = decider.add("be2", prompt_tokens=3)
    decider.step()
    decider.scheduler.restart()
    assert decider.kv.num_used_blocks == 0
    assert decider.scheduler.running == []
    assert [request.num_preemptions for request in (*running, waiting)] == [1, 1, 0]
    assert decider.step() == {"be0": 4, "be1": 4}
    assert decider.scheduler.num_waiting == 1


# -- small things with consequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_late", [False, True])
def test_the_first_real_time_request_that_finds_no_seat_ends_the_step(is_late):
    decider = Decider("bros", max_num_seqs=4)
    for i in range(4):
        decider.add(f"rt{i}")
    decider.step()
    for request in decider.scheduler.requests.values():
        request.deadline_s = decider.now_s + (0.001 if is_late else 9.0)
    decider.scheduler.config = type(decider.scheduler.config)(max_num_seqs=2)
    assert list(decider.decide()) == ["rt0", "rt1"]
    assert decider.output.left_out == {"rt2": BATCH_CAP}
    assert decider.output.num_behind == 1


def test_best_effort_without_a_seat_ends_the_step():
    decider = Decider("bros", max_num_seqs=4)
    for i in range(4):
        decider.add(f"be{i}")
    decider.step()
    decider.scheduler.config = type(decider.scheduler.config)(max_num_seqs=2)
    assert list(decider.decide()) == ["be0", "be1"]
    assert decider.output.left_out == {"be2": BATCH_CAP}
    assert decider.output.num_behind == 1


def test_without_slow_start_the_batch_is_as_large_as_the_seats():
    decider = Decider("bros+seats", base_batch_cap=1)
    for i in range(8):
        decider.add(f"be{i}")
    assert len(decider.step()) == 8


def test_a_newcomer_of_best_effort_needs_room_for_its_whole_prompt():
    """Its first chunk alone would fit."""
    decider = Decider("bros-plus", num_blocks=8, max_num_batched_tokens=8)
    decider.add("be0", prompt_tokens=8)
    decider.step()
    decider.add("be1", prompt_tokens=28)
    assert decider.step() == {"be0": 1}
    assert decider.output.left_out == {"be1": NO_BLOCKS}


def test_an_ended_head_of_the_queue_is_skipped():
    decider = Decider("bros")
    decider.abort(decider.add("be0"))
    decider.add("be1")
    assert decider.decide() == {"be1": 1}


def test_a_preempted_best_effort_request_comes_back_before_those_that_wait():
    decider = Decider("bros")
    request = decider.add("be0", prompt_tokens=4)
    decider.step()
    decider.add("be1")
    decider.scheduler.recompute(request)
    assert list(decider.decide()) == ["be0", "be1"]


def test_a_whole_prompt_beyond_the_budget_is_the_only_prefill_of_its_step():
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=8)
    decider.add("be0")
    decider.step()
    for name in ("be1", "be2"):
        decider.add(name, prompt_tokens=20)
    assert decider.decide() == {"be0": 1, "be1": 20}
    assert decider.output.left_out == {"be2": TOKEN_BUDGET}


@pytest.mark.parametrize(("waited", "admitted"), [(4, {}), (5, {"rt-late": 20})])
def test_a_late_whole_prompt_that_waited_too_long_joins_another_prefill(waited, admitted):
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=8, be_max_wait_steps=4)
    decider.add("rt0", prompt_tokens=8)
    decider.add("rt-late", prompt_tokens=20, slo=SLO(0.001, 1.0)).last_step = 1 - waited
    assert decider.decide() == {"rt0": 8, **admitted}


@pytest.mark.parametrize(("min_chunk_tokens", "admitted"), [(16, False), (4, True)])
def test_a_chunk_shorter_than_the_least_is_refused(min_chunk_tokens, admitted):
    """9.5 ms are left beside the RT: 9 tokens."""
    decider = Decider("bros-plus", num_blocks=100, min_chunk_tokens=min_chunk_tokens)
    decider.add("rt0").deadline_s = decider.now_s + 0.0205
    decider.add("be0", prompt_tokens=40)
    assert decider.decide() == ({"rt0": 1, "be0": 9} if admitted else {"rt0": 1})
    assert decider.output.left_out == ({} if admitted else {"be0": DEADLINE})


def test_an_empty_batch_takes_the_least_chunk_whatever_the_deadline():
    decider = Decider("bros-plus", num_blocks=100, coefficients=(0.010, 0.001, 0.01, 0.0), max_num_batched_tokens=1)
    rt = decider.add("rt0", prompt_tokens=4, slo=SLO(0.08, 1.0))
    for _ in range(4):
        assert decider.step() == {"rt0": 1}
    assert rt.output_token_ids == [7]


def test_no_time_is_learnt_from_nothing_and_every_step_is_observed():
    decider = Decider("bros", coefficients=(0.010, 0.001, 0.00001, 0.00001))
    decider.truth.c0 = 0.020
    for i in range(4):
        decider.add(f"be{i}", prompt_tokens=3)
    for _ in range(32):
        decider.step()
    assert decider.latency.c0 > 0.015
    assert decider.latency.safety > 1.0


def test_the_step_after_one_that_ended_a_request_has_its_blocks_and_seat():
    decider = Decider("bros", num_blocks=2, max_num_seqs=1)
    decider.add("be0", prompt_tokens=8, max_tokens=1)
    decider.add("be1", prompt_tokens=8, max_tokens=1)
    assert [list(decider.step()) for _ in range(3)] == [["be0"], ["be1"], []]
    assert decider.scheduler.running == []
    assert decider.kv.num_used_blocks == 0
    decider.add("be2", prompt_tokens=8)
    decider.step()
    decider.abort(decider.scheduler.requests["be2"])
    assert decider.scheduler.running == []


def test_stored_kv_that_cannot_be_trusted_is_recomputed():
    decider = Decider("bros")
    request = decider.add("be0", prompt_tokens=4)
    waiting = decider.add("be-waiting", prompt_tokens=4)
    decider.scheduler.forget_kv("be-waiting")
    decider.scheduler.forget_kv("nobody")
    assert waiting.num_preemptions == 0
    decider.step()
    decider.scheduler.forget_kv("be0")
    assert (request.status, request.num_computed_tokens, request.num_preemptions) == (RequestStatus.WAITING, 0, 1)
    assert decider.step()["be0"] == 5


def test_a_request_that_ended_while_it_could_still_be_on_time_is_skipped():
    decider = Decider("bros")
    decider.abort(decider.add("rt0"))
    decider.add("rt1")
    assert decider.decide() == {"rt1": 1}


def test_the_one_that_stood_aside_is_bound_by_real_time_alone():
    """No BE may slow RT down at all; that is no reason to keep an RT out."""
    decider = Decider("bros", max_num_seqs=2, rt_slowdown=1.0)
    decider.add("be0")
    for i in range(2):
        decider.add(f"rt{i}")
    assert list(decider.decide()) == ["rt0", "rt1"]
    assert decider.output.left_out == {"be0": DEADLINE}


def test_a_starving_head_of_the_queue_begins_with_the_room_there_is():
    decider = Decider("bros-plus", num_blocks=8, max_num_batched_tokens=8, be_max_wait_steps=4)
    decider.add("rt0", prompt_tokens=8)
    decider.step()
    head = decider.add("be0", prompt_tokens=28)
    assert decider.decide() == {"rt0": 1}, "seven blocks for the whole prompt, and five are free"
    head.last_step -= 5
    assert decider.decide() == {"rt0": 1, "be0": 16}, "min_chunk_tokens"


def test_each_chunk_of_a_prompt_that_is_left_takes_the_fixed_time_of_a_step():
    """16 chunks: 0.16 s, 0.128 s for their tokens and 0.082 s for the pairs."""
    for residual_s, is_late in ((0.365, True), (0.375, False)):
        decider = Decider("bros-plus", max_num_batched_tokens=8)
        decider.add("rt0", prompt_tokens=128).deadline_s = residual_s
        decider.decide()
        assert (decider.output.step_budget_s is None) is is_late


def test_best_effort_out_of_blocks_swaps_out_those_ordered_after_it():
    decider = Decider("bros", num_blocks=4)
    for i in range(2):
        decider.add(f"be{i}", prompt_tokens=8)
    decider.step()
    assert decider.step() == {"be0": 1}
    assert decider.kv.offloaded_tokens == {"be1": 4}
    assert not decider.output.preempted


def test_best_effort_whose_victims_find_no_host_memory_recomputes_the_last():
    decider = Decider("bros", num_blocks=4, num_host_blocks=0)
    for i in range(2):
        decider.add(f"be{i}", prompt_tokens=8)
    decider.step()
    assert decider.step() == {"be0": 1}
    assert decider.output.preempted == {"be1": "recompute"}
    assert decider.output.left_out == {"be1": NO_BLOCKS}, "it does not come back in the step in which it gave way"


def test_best_effort_never_takes_blocks_of_real_time():
    decider = Decider("bros", num_blocks=4, max_num_batched_tokens=64)
    decider.add("be0", prompt_tokens=8)
    rt = decider.add("rt0", prompt_tokens=8)
    decider.step()
    rt.deadline_s = decider.now_s + 0.001  # late, and its decode needs a block too
    decider.step()
    assert not decider.scheduler.output.preempted.get("rt0")
    assert rt.num_preemptions == 0
    assert "rt0" not in decider.kv.offloaded_tokens


def test_of_several_reasons_the_last_is_the_binding_one():
    decider = Decider("bros", num_blocks=8, max_num_batched_tokens=1000)
    decider.add("rt0", slo=SLO(0.1, 9.0))
    decider.add("rt-long", prompt_tokens=80, slo=SLO(9.0, 9.0))
    decider.add("be0", prompt_tokens=36)
    decider.decide()
    assert decider.output.left_out == {"rt-long": DEADLINE, "be0": NO_BLOCKS}
    assert decider.output.binding == NO_BLOCKS


def test_those_who_remain_in_the_batch_of_a_victim_are_added_up_anew():
    decider = Decider("vllm-priority", num_blocks=5, max_num_batched_tokens=64, chunked_prefill=True)
    decider.add("rt0")
    decider.add("be0", prompt_tokens=5)
    decider.step()
    decider.add("rt1", prompt_tokens=8)
    decider.step()
    assert decider.decide() == {"rt0": 1, "rt1": 1}
    assert decider.output.preempted == {"be0": "recompute"}
    assert decider.output.features.decode_contexts == 2 + 8
    assert decider.output.features.new_tokens == 2


def test_a_more_urgent_real_time_request_without_blocks_does_not_shorten_the_step():
    """The newcomer is due in 0.1 s, and spares the holder of all blocks, which is due before its own TTFT is over."""
    decider = Decider("bros-plus", num_blocks=4)
    holder = decider.add("rt-holder", prompt_tokens=15)
    decider.step()
    holder.deadline_s = decider.now_s + 0.5
    decider.add("rt-newcomer", prompt_tokens=8, slo=SLO(1.1, 1.0), arrival_s=decider.now_s - 1.0)
    assert decider.decide() == {"rt-holder": 1}
    assert decider.output.left_out == {"rt-newcomer": NO_BLOCKS}
    assert decider.output.step_budget_s == pytest.approx(0.5)


def test_the_last_resort_takes_the_real_time_request_with_the_latest_deadline_first_the_late():
    for late, victim in ((False, "rt-b"), (True, "rt-a")):
        decider = Decider("bros", num_blocks=4)
        for name in ("rt-a", "rt-b"):
            decider.add(name, prompt_tokens=7)
        decider.step()
        requests = decider.scheduler.requests
        requests["rt-a"].deadline_s = decider.now_s + (0.001 if late else 5.0)
        requests["rt-b"].deadline_s = decider.now_s + 9.0
        decider.add("rt-urgent", prompt_tokens=8, slo=SLO(1.0, 1.0))
        assert "rt-urgent" in decider.decide()
        assert decider.output.preempted == {victim: "swap"}


def test_the_copies_ordered_for_a_victim_still_count():
    """Copies of a victim are made all the same; the step waits for them."""
    decider = Decider("bros")
    request = decider.add("be0", prompt_tokens=40)
    decider.step()
    assert decider.kv.swap_out("be0")
    decider.decide()
    decider.scheduler.recompute(request)
    assert decider.scheduler.output.features.restored_tokens == 40
    assert decider.scheduler.output.features.new_tokens == 0


@pytest.mark.parametrize("is_swapped_out", [True, False])
def test_an_empty_batch_takes_a_request_whatever_it_takes(is_swapped_out):
    """58 ms are left beside a typical newcomer: 120 tokens take 60 ms to copy back, and 0.2 s to compute."""
    decider = Decider("bros", num_blocks=100, max_num_batched_tokens=200)
    decider.add("be0", prompt_tokens=120)
    if is_swapped_out:
        decider.step()
        assert decider.kv.swap_out("be0")
    decider.abort(decider.add("rt-typical", prompt_tokens=20, slo=SLO(0.09, 1.0)))
    assert decider.decide() == {"be0": 1 if is_swapped_out else 120}
    assert decider.output.step_budget_s == pytest.approx(0.058)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_lower_limit_on_the_tokens_of_a_step_ends_with_that_step(chunked):
    decider = Decider("bros", max_num_batched_tokens=8, chunked_prefill=chunked)
    decider.scheduler.max_step_tokens = 1
    for i in range(2):
        decider.add(f"be{i}", prompt_tokens=4)
    assert decider.decide() == {"be0": 4, "be1": 4}


def test_each_newcomer_of_real_time_is_offered_once_a_seat_at_most():
    decider = Decider("bros", max_num_seqs=2)
    for i in range(5):
        decider.add(f"rt{i}")
    decider.decide()
    assert list(decider.output.slack_s) == ["rt0", "rt1"]
