"""BROS's rules, one by one and as properties: the constraints of the paper, and the bound on waiting that is ours."""

import copy
import random

import pytest
from decisions import EASY, Decider
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.request import SLO
from bros_ref.scheduler.base import BANKED_SHARE
from bros_ref.trace import BATCH_CAP, DEADLINE, NO_BLOCKS


def test_real_time_goes_first_and_by_slack():
    decider = Decider("bros", max_num_seqs=2)
    decider.add("be0")
    decider.add("rt-late-deadline", slo=SLO(5.0, 1.0))
    decider.add("rt-urgent", slo=SLO(1.0, 1.0))
    assert next(iter(decider.step())) == "rt-urgent"


def test_the_residual_of_the_most_urgent_keeps_a_long_best_effort_prefill_out():
    decider = Decider("bros", num_blocks=200, max_num_batched_tokens=1000)
    decider.add("rt0", slo=SLO(0.1, 0.05))
    decider.add("be0", prompt_tokens=200)  # 0.2 s and more
    decided = decider.decide()
    assert "be0" not in decided
    assert decider.output.left_out["be0"] == DEADLINE
    assert decider.output.step_budget_s <= 0.1


def test_a_late_request_sets_no_bound_but_still_goes_before_best_effort():
    decider = Decider("bros", max_num_seqs=2)
    decider.add("be0", prompt_tokens=8)
    decider.add("be1", prompt_tokens=8)
    late = decider.add("rt0", slo=SLO(1.0, 1.0))
    late.deadline_s = decider.now_s - 1.0
    decided = list(decider.decide())
    assert decided[0] == "rt0"
    assert len(decided) == 2


def test_the_last_seat_goes_to_best_effort_if_the_slackest_can_wait():
    decider = Decider("bros", max_num_seqs=2)
    decider.add("be0")
    for i in range(2):
        decider.add(f"rt{i}", slo=SLO(100.0, 100.0))
    assert list(decider.step()) == ["rt0", "be0"]
    assert decider.output.left_out["rt1"] == BATCH_CAP


def test_newcomers_of_best_effort_displace_nobody():
    decider = Decider("bros", num_blocks=4)
    decider.add("be0", prompt_tokens=12, max_tokens=4)
    decider.step()
    decider.add("be1", prompt_tokens=8, max_tokens=2)
    decider.step()
    assert decider.output.left_out == {"be1": NO_BLOCKS}
    assert not decider.kv.offloaded_tokens


def test_the_last_resort_swaps_out_the_real_time_request_with_the_most_slack():
    decider = Decider("bros", num_blocks=4)
    decider.add("rt-easy", prompt_tokens=8, max_tokens=8, slo=EASY)
    decider.step()
    decider.add("rt-urgent", prompt_tokens=12, max_tokens=4, slo=SLO(0.5, 0.5))
    assert "rt-urgent" in decider.step()
    assert decider.kv.offloaded_tokens["rt-easy"] > 0
    decider.kv.check_integrity()


@pytest.mark.parametrize("policy", ["bros", "bros-plus", "bros-recompute", "bros-swap-block"])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_a_real_time_request_out_of_slack_never_waits_behind_best_effort(policy, seed):
    """Each decision is taken a second time on a copy without best-effort requests: an RT that is out of slack and
    runs there also runs in the presence of best-effort. (No BE is starving here: that is the one exception, by the
    bound on its waiting.)"""
    rng = random.Random(seed)
    decider = Decider(policy, rng.choice([8, 20, 400]), num_host_blocks=rng.choice([None, 0, 2]),
                      max_num_seqs=rng.choice([1, 2, 4, 8]), max_num_batched_tokens=rng.choice([8, 64]),
                      base_batch_cap=rng.choice([1, 128]), be_max_wait_steps=10**6)
    for step in range(25):
        for i in range(rng.randint(0, 2)):
            slo = SLO(rng.choice([0.001, 0.03, 0.06, 0.2, 1.0]), rng.choice([0.001, 0.015, 0.03, 0.1]))
            decider.add(f"{rng.choice(['rt', 'be'])}{step}-{i}", rng.randint(1, 30), rng.randint(1, 20), slo=slo)
        without_be = copy.deepcopy(decider)
        for request in list(without_be.scheduler.requests.values()):
            if not request.is_rt:
                without_be.abort(request)
        placed, decided = without_be.decide(), decider.step()
        for name in placed.keys() - decided.keys():
            assert without_be.output.slack_s[name] > 0, f"{name} in step {step}: {decider.output.left_out}"


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), longest_wait=st.sampled_from([3, 8]))
def test_a_best_effort_request_that_holds_kv_runs_within_n_plus_s_steps(seed, longest_wait):
    """Real-time requests arrive faster than they can be served on time; the pool is ample."""
    rng = random.Random(seed)
    decider = Decider("bros", num_blocks=400, max_num_seqs=rng.choice([2, 4, 8]),
                      max_num_batched_tokens=rng.choice([8, 64]), chunked_prefill=rng.random() < 0.5,
                      be_max_wait_steps=longest_wait)
    for i in range(rng.randint(1, 4)):
        decider.add(f"be{i}", prompt_tokens=rng.randint(1, 7), max_tokens=300)
    waited = {}
    for step in range(120):
        for i in range(rng.randint(0, 2)):
            decider.add(f"rt{step}-{i}", prompt_tokens=rng.randint(1, 12), max_tokens=rng.randint(1, 6),
                        slo=SLO(rng.choice([0.001, 0.03, 0.2]), rng.choice([0.001, 0.02])))
        ran = decider.step()
        holding = [r.request_id for r in decider.scheduler.running if not r.is_rt]
        for name in holding:
            waited[name] = 0 if name in ran else waited.get(name, 0) + 1
            assert waited[name] <= longest_wait + len(holding) + 1, f"{name} in step {step}"


def test_an_iteration_leaves_room_for_a_real_time_request_that_has_not_arrived_yet():
    decider = Decider("bros", num_blocks=400, max_num_batched_tokens=1000, chunked_prefill=True)
    decider.add("rt0", prompt_tokens=20, max_tokens=1, slo=SLO(0.1, 0.1))
    decider.step()
    decider.add("be0", prompt_tokens=600)
    decider.add("be1", prompt_tokens=600)
    decider.step()
    own_s = 0.010 + 0.001 * 20 + 0.00001 * 20 * 10
    assert decider.output.step_budget_s == pytest.approx(0.1 - own_s)
    assert decider.output.predicted_s <= 0.1 - own_s


# -- nothing stalls, nobody waits for ever, nobody is preempted in vain -----------------------------------------------


def test_a_real_time_request_without_blocks_does_not_bound_those_that_can_run():
    """A is due in 13.5 ms and finds no blocks: they belong to B and D, which are spared because A's TTFT is longer."""
    decider = Decider("bros-plus", num_blocks=16, max_num_batched_tokens=32)
    decider.add("rtB", 48, 4, SLO(0.6, 0.6))
    decider.step()
    decider.add("rtD", 48, 4, SLO(0.4, 0.4))
    decider.step()
    decider.add("rtA", 2, 4, SLO(1.0135, 0.6), arrival_s=decider.now_s - 1)
    decider.decide()
    assert decider.output.left_out["rtA"] == NO_BLOCKS
    assert decider.output.requests
    assert decider.output.step_budget_s > 0.1  # of D, not the 13.5 ms of A
    decider.compute()
    for _ in range(20):
        decider.step()
    assert not decider.scheduler.requests


def test_an_empty_batch_takes_a_chunk_that_exceeds_the_budget():
    """A prompt of 20 tokens, one per step: the 20th costs 0.2 s as part of a chunk, and 0.04 s are left."""
    decider = Decider("bros-plus", coefficients=(0.01, 0.001, 0.01, 0), max_num_batched_tokens=1)
    decider.add("rt0", 20, 2, SLO(0.25, 0.25))
    for _ in range(21):
        assert decider.step() == {"rt0": 1}




def num_rt_blocks(decider):
    return sum(view.rt_owner is not None for view in decider.kv.snapshot())


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), longest_wait=st.sampled_from([3, 8]))
def test_a_starving_best_effort_request_runs_within_s_of_the_steps_in_which_its_kv_fits(seed, longest_wait):
    """The bound that `scheduler/bros.py` states, in a pool that RT and BE fight for: seats, tokens, time and blocks are
    all scarce. A step counts if the BE's KV with one more token (a whole prompt where prompts are not cut) fits beside
    what RT hold when it is offered a place."""
    rng = random.Random(seed)
    chunked, num_blocks, block_size = rng.random() < 0.7, rng.choice([8, 12, 20]), rng.choice([1, 4, 16])
    room = num_blocks * block_size
    decider = Decider(rng.choice(["bros", "bros-plus", "bros-swap-block", "bros-recompute"]), num_blocks, block_size,
                      rng.choice([None, 0, 3]), max_num_seqs=rng.choice([1, 2, 4, 8]),
                      max_num_batched_tokens=rng.choice([8, 64]), chunked_prefill=chunked,
                      be_max_wait_steps=longest_wait)
    for i in range(rng.randint(1, 5)):
        decider.add(f"be{i}", rng.randint(1, max(1, room // 2)), 30)
    try_admit, counted, ahead, offered = decider.scheduler.try_admit, {}, {}, {}

    def noted(request, step_budget_s, exempt=False):
        if exempt:
            offered[request.request_id] = num_rt_blocks(decider)
        return try_admit(request, step_budget_s, exempt)

    decider.scheduler.try_admit = noted
    for step in range(100):
        for i in range(rng.randint(0, 2)):
            decider.add(f"rt{step}-{i}", rng.randint(1, max(1, room // 3)), rng.randint(1, 6),
                        slo=SLO(rng.choice([0.001, 0.03, 0.2, 5.0]), rng.choice([0.001, 0.02, 1.0])))
        holding = [r for r in decider.scheduler.running if not r.is_rt]
        starving = [r for r in holding if decider.scheduler.step + 1 - r.last_step > longest_wait]
        for request in starving:
            ahead.setdefault(request.request_id, len(holding))
        before = num_rt_blocks(decider)
        offered.clear()
        ran = decider.decide()
        not_offered = max(before, num_rt_blocks(decider))
        for request in starving:
            name = request.request_id
            if name in ran or name in decider.output.preempted:
                counted.pop(name, None), ahead.pop(name)
                continue
            left = request.num_tokens - request.num_computed_tokens
            wanted = request.num_computed_tokens + (1 if decider.scheduler.config.chunked_prefill else left)
            rt_blocks = offered.get(name, not_offered)
            counted[name] = counted.get(name, 0) + (decider.kv.blocks_for(wanted) <= num_blocks - rt_blocks)
            assert counted[name] < ahead[name], f"{name} in step {step}: {decider.output.left_out}"
        decider.compute()


def test_a_starving_request_that_cannot_be_placed_keeps_the_next_from_nothing():
    decider = Decider("bros-plus", num_blocks=8, block_size=16, be_max_wait_steps=4)
    decider.add("beB", 4, 200)
    decider.step()
    decider.add("beA", 60, 60)
    for _ in range(3):
        decider.step()
    decider.add("rtR", 75, 45, SLO(10.0, 0.0124))
    waited = longest = steps = 0
    while num_rt_blocks(decider) < 8:
        waited = 0 if "beB" in decider.step() else waited + 1
        longest, steps = max(longest, waited), steps + 1
    assert steps > 30
    assert longest == 4


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_nobody_is_preempted_in_vain(seed):
    """A request is preempted only for one that runs in this step."""
    rng = random.Random(seed)
    num_blocks, block_size = rng.choice([4, 8, 12]), rng.choice([1, 4])
    room = num_blocks * block_size
    decider = Decider(rng.choice(["bros", "bros-plus", "bros-recompute", "bros-swap-block"]), num_blocks, block_size,
                      rng.choice([0, 0, 1, None]), max_num_seqs=rng.choice([2, 8]),
                      be_max_wait_steps=rng.choice([1, 8]), max_num_batched_tokens=rng.choice([4, 64]),
                      chunked_prefill=rng.random() < 0.5)
    preempt_for, asked = decider.scheduler.preempt_for, {}

    def noted(request, count):
        before = len(decider.scheduler.output.preempted)
        gave = preempt_for(request, count)
        if len(decider.scheduler.output.preempted) > before:
            asked[request.request_id] = True
        return gave

    decider.scheduler.preempt_for = noted
    for step in range(60):
        if rng.random() < 0.5:
            decider.add(f"{rng.choice(['rt', 'be'])}{step}", rng.randint(1, max(1, int(room * 0.7))),
                        rng.randint(1, max(1, room // 4)),
                        slo=SLO(rng.choice([0.01, 0.2, 5.0]), rng.choice([0.012, 0.05, 0.5])))
        asked.clear()
        ran = decider.step()
        assert asked.keys() <= ran.keys(), decider.output.left_out


def test_a_pending_chunk_that_lacks_blocks_is_cut_to_those_there_are():
    decider = Decider("bros-plus", num_blocks=8, max_num_batched_tokens=16, be_max_wait_steps=2)
    decider.add("be0", prompt_tokens=32, max_tokens=1)
    decider.step()
    decider.add("rt0", prompt_tokens=9, max_tokens=7)
    assert decider.step() == {"rt0": 9, "be0": 3}, "7 tokens are left, which need two blocks; one is there"


def test_the_first_reason_for_a_refusal_is_the_one_that_is_told():
    """A starving BE finds no blocks; offered again in its turn, it would not even have the time."""
    decider = Decider("bros", num_blocks=8, max_num_batched_tokens=100, be_max_wait_steps=1)
    decider.add("be0", prompt_tokens=16, max_tokens=16)
    decider.step()
    decider.add("rt0", prompt_tokens=28, max_tokens=4, slo=SLO(1.0, 0.0118))
    decider.step()
    assert decider.step() == {"rt0": 1}
    assert decider.output.left_out == {"be0": NO_BLOCKS}


def test_a_short_late_request_passes_a_long_one_that_was_refused():
    decider = Decider("bros", num_blocks=200, max_num_batched_tokens=1000)
    decider.add("rt-on-time", prompt_tokens=4, slo=SLO(0.1, 0.1))
    for name, tokens in (("rt-long", 200), ("rt-longer", 300), ("rt-short", 4)):
        decider.add(name, prompt_tokens=tokens, slo=SLO(0.001, 1.0))
    assert list(decider.step()) == ["rt-on-time", "rt-short"]
    assert decider.output.left_out == {"rt-long": DEADLINE}
    assert decider.output.num_behind == 1, "the longer one stands behind it"


# -- what bros-plus changes -----------------------------------------------------------------------------------------


@given(durations_s=st.lists(st.floats(0.001, 0.5), min_size=1, max_size=12), tpot_s=st.floats(0.01, 0.3))
@settings(max_examples=40)
def test_banked_time_moves_a_deadline_later_never_earlier(durations_s, tpot_s):
    """Due: the paper's last token + TPOT, or first token + k * 0.9 TPOT if that is later."""
    deadlines = {}
    for policy in ("bros", "bros+bank"):
        decider = Decider(policy)
        request = decider.add("rt0", prompt_tokens=4, slo=SLO(10.0, tpot_s))
        deadlines[policy] = []
        for duration_s in durations_s:
            decider.decide()
            decider.now_s += duration_s - decider.truth.predict(decider.output.features)  # the step takes so long
            decider.compute()
            deadlines[policy].append(request.deadline_s)
            paper_s = decider.now_s + tpot_s
            schedule_s = request.first_token_s + BANKED_SHARE * tpot_s * len(request.output_token_ids)
            assert request.deadline_s == pytest.approx(paper_s if policy == "bros" else max(paper_s, schedule_s))
    assert all(later >= paper for later, paper in zip(deadlines["bros+bank"], deadlines["bros"], strict=True))


@pytest.mark.parametrize(("policy", "started", "displaced"), [
    ("bros", SLO(5.0, 0.4), True), ("bros+lazy", SLO(5.0, 0.4), False), ("bros+lazy", SLO(5.0, 0.9), True)])
def test_a_lazy_newcomer_displaces_only_a_real_time_request_that_can_wait_as_long_as_it(policy, started, displaced):
    decider = Decider(policy, num_blocks=4)
    decider.add("rt-started", prompt_tokens=8, max_tokens=8, slo=started)
    decider.step()
    decider.add("rt-newcomer", prompt_tokens=12, max_tokens=4, slo=SLO(0.3 if displaced else 0.5, 0.3))
    decider.decide()
    assert ("rt-started" in decider.kv.offloaded_tokens) is displaced
    assert (decider.output.left_out.get("rt-newcomer") == NO_BLOCKS) is not displaced


@pytest.mark.parametrize(("policy", "comes_back"), [("bros", True), ("bros+lazy", False)])
def test_a_swapped_out_request_that_can_wait_comes_back_at_nobodys_cost_if_lazy(policy, comes_back):
    decider = Decider(policy, num_blocks=4)
    waiting = decider.add("rt-waiting", prompt_tokens=8, max_tokens=8, slo=SLO(9.0, 9.0))
    decider.step()
    decider.add("rt-holding", prompt_tokens=12, max_tokens=4, slo=SLO(0.5, 0.5))
    decider.step()
    assert decider.kv.offloaded_tokens["rt-waiting"] > 0
    holding = decider.scheduler.requests["rt-holding"]
    holding.deadline_s = waiting.deadline_s + 1.0  # now the other is the more urgent one, though not urgent
    assert ("rt-waiting" in decider.decide()) is comes_back
    decider.compute()
    waiting.deadline_s = decider.now_s + 0.03
    assert "rt-waiting" in decider.step(), "it cannot wait any longer"


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_lazy_pool_full_of_real_time_requests_serves_every_one_to_its_end(seed):
    """More RT than the pool holds, targets tight and loose: no request waits forever, and the accounting holds."""
    rng = random.Random(seed)
    decider = Decider("bros-plus", num_blocks=rng.choice([6, 10]), num_host_blocks=rng.choice([0, 4, None]))
    for i in range(12):
        decider.add(f"rt{i}", prompt_tokens=rng.randint(1, 12), max_tokens=rng.randint(1, 10),
                    slo=SLO(rng.choice([0.05, 0.5]), rng.choice([0.02, 0.2])))
    for _ in range(1500):
        decider.step()
        if not decider.scheduler.requests:
            return
    raise AssertionError(f"still there: {list(decider.scheduler.requests)}")


def test_a_long_prompt_that_cannot_be_on_time_any_more_bounds_nobody_though_its_next_chunk_could():
    decider = Decider("bros-plus", num_blocks=400, max_num_batched_tokens=64)
    decider.add("rt-hopeless", prompt_tokens=640, slo=SLO(0.7, 1.0))  # ten chunks take 0.74 s and what pairs cost
    decider.add("rt-on-time", prompt_tokens=32, slo=SLO(0.9, 1.0))
    assert decider.step() == {"rt-on-time": 32, "rt-hopeless": 32}
    assert decider.output.step_budget_s == pytest.approx(0.9)


def test_long_prompts_do_not_take_turns():
    """The one with the earlier deadline is computed to its end first, however far it is."""
    decider = Decider("bros-plus", num_blocks=400, max_num_batched_tokens=64)
    decider.add("rt-before", prompt_tokens=64, max_tokens=1)
    decider.step()
    for i in range(3):
        decider.add(f"rt{i}", prompt_tokens=192, slo=SLO(5.0 + i / 100, 5.0))
    started = []
    for _ in range(7):
        started += [name for name in decider.step() if name not in started]
    assert [decider.scheduler.requests[f"rt{i}"].num_computed_tokens > 64 for i in range(3)] == [True, True, False]
    assert started == ["rt0", "rt1", "rt2"]


@pytest.mark.parametrize("slowdown", [1.0, 1.5, 3.0])
def test_best_effort_stretches_an_iteration_no_further_than_the_slowdown_that_is_allowed(slowdown):
    decider = Decider("bros-plus", num_blocks=400, rt_slowdown=slowdown, max_num_seqs=64, max_num_batched_tokens=512)
    decider.add("rt0", prompt_tokens=8, max_tokens=20)
    for i in range(30):
        decider.add(f"be{i}", prompt_tokens=2)
    longest_s = 0.0
    while "rt0" in decider.scheduler.requests:
        request = decider.scheduler.requests["rt0"]
        alone_s = 0.010 + decider.latency.cost_s(request.num_tokens - request.num_computed_tokens,
                                                 request.num_computed_tokens)
        decider.step()
        assert "rt0" not in decider.output.left_out
        stretched_s = decider.output.predicted_s - alone_s
        assert stretched_s <= (slowdown - 1) * 0.010 + 1e-12
        longest_s = max(longest_s, stretched_s)
    assert longest_s > 0.7 * (slowdown - 1) * 0.010 or slowdown == 1.0
    assert len(decider.step()) > 1, "nobody is slowed down any more"


@pytest.mark.parametrize("slowdown", [0.99, float("inf"), float("nan")])
def test_a_slowdown_that_says_nothing_is_refused(slowdown):
    with pytest.raises(ValueError, match="rt_slowdown must be None or a finite number of at least 1"):
        Decider("bros-plus", rt_slowdown=slowdown)


@pytest.mark.parametrize(("policy", "seats"), [("bros", 2), ("bros+seats", 8)])
def test_the_batch_cap_is_the_papers_and_an_option(policy, seats):
    decider = Decider(policy, base_batch_cap=2, max_num_batched_tokens=1000, num_blocks=400)
    decider.add("rt-urgent", slo=SLO(0.05, 0.05))
    decider.add("rt-long", prompt_tokens=100, slo=SLO(9.0, 9.0))
    decider.decide()
    assert decider.output.left_out == {"rt-long": DEADLINE}
    decider.compute()
    decider.decide()
    assert decider.scheduler.max_batch_size == seats


@pytest.mark.parametrize("policy", ["bros", "bros-plus", "bros-swap-block", "bros-swap-request", "bros-recompute"])
def test_long_prompts_that_do_not_fit_together_all_end(policy):
    """Prompts of a third of the pool and more, in small chunks, late or not: they may preempt one another, but not
    forever."""
    for seed in range(200):
        rng = random.Random(seed)
        block_size, num_blocks = rng.choice([1, 4, 16]), rng.choice([4, 8, 23])
        room = num_blocks * block_size
        decider = Decider(policy, num_blocks, block_size, rng.choice([None, 0, 2]), max_num_seqs=rng.choice([2, 6]),
                          max_num_batched_tokens=rng.choice([2, 8]), be_max_wait_steps=rng.choice([1, 2, 16]),
                          chunked_prefill=True, min_chunk_tokens=rng.choice([1, 4, 16]))
        for i in range(rng.randint(2, 8)):
            prompt_tokens = max(1, rng.choice([room // 3, room // 2, room // 2, int(room * 0.8)]))
            slo = SLO(rng.choice([0.01, 0.2, 1.0, 5.0]), rng.choice([0.012, 0.05, 0.5]))
            max_tokens = rng.randint(1, min(20, room - prompt_tokens))
            decider.add(f"{rng.choice(['rt', 'rt', 'be'])}{i}", prompt_tokens, max_tokens, slo=slo)
        for _ in range(6_000):
            if not decider.scheduler.requests:
                break
            decider.step()
        assert not decider.scheduler.requests, f"seed {seed}: {sorted(decider.scheduler.requests)} never end"


def test_the_batch_cap_begins_at_its_base_and_doubles():
    decider = Decider("bros", base_batch_cap=2)
    for i in range(8):
        decider.add(f"be{i}")
    assert [len(decider.step()) for _ in range(3)] == [2, 4, 8]


def test_waiting_is_counted_from_arrival():
    decider = Decider("bros")
    for _ in range(5):
        decider.step()
    assert decider.add("be0").last_step == 5


@pytest.mark.parametrize(("safety", "admitted"), [(1.0, True), (2.0, False)])
def test_predictions_are_multiplied_by_the_safety_factor_before_they_meet_a_deadline(safety, admitted):
    decider = Decider("bros")
    decider.latency.safety = safety
    decider.add("rt0", slo=SLO(0.1, 0.1))
    decider.add("be0", prompt_tokens=40)  # 51 ms for its tokens, 8 ms for their pairs
    assert ("be0" in decider.decide()) is admitted
