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


def test_a_tighter_target_is_typical_at_once_and_a_looser_one_slowly():
    """20 tokens take 32 ms alone. Due after 0.1 s they leave 68 ms, in which 60 BE tokens do not fit."""
    decider = Decider("bros", num_blocks=400, max_num_batched_tokens=1000)
    decider.add("rt-loose", prompt_tokens=20, max_tokens=2, slo=SLO(60.0, 9.0))
    decider.add("rt-tight", prompt_tokens=20, max_tokens=2, slo=SLO(0.1, 9.0))
    assert decider.scheduler._typical_ttft_s == 0.1
    decider.step()
    decider.latency.safety = 1.0
    decider.add("be0", prompt_tokens=60)
    assert "be0" not in decider.decide()
    decider.add("rt-loose-again", prompt_tokens=20, slo=SLO(1.1, 9.0))
    assert decider.scheduler._typical_ttft_s == pytest.approx(0.2)


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
