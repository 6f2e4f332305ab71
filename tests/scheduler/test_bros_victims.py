"""One small decision for each line of BROS's rules, third part: who gives way to whom when blocks are short.

Times are those of `test_bros_lines.py`; blocks have four slots. A request whose tokens fill its blocks needs one more
block for its next token.
"""

from dataclasses import replace

import pytest
from decisions import Decider

from bros_ref.request import SLO
from bros_ref.trace import DEADLINE, NO_BLOCKS


def full(policy, *names, num_blocks, prompt_tokens=8, **limits):
    """A pool in which these requests have just filled two blocks each; returns the decider and the requests."""
    decider = Decider(policy, num_blocks, max_num_batched_tokens=1000, **limits)
    requests = [decider.add(name, prompt_tokens) for name in names]
    decider.step()
    return decider, *requests


# -- best-effort gives way --------------------------------------------------------------------------------------------


def test_real_time_recomputes_as_many_best_effort_requests_as_it_needs_the_last_first():
    decider, *_ = full("bros-recompute", "be0", "be1", "be2", num_blocks=6)
    decider.add("rt0", prompt_tokens=16)
    assert decider.decide()["rt0"] == 16
    assert decider.output.preempted == {"be2": "recompute", "be1": "recompute"}


def test_best_effort_that_only_shares_a_block_with_another_request_is_not_recomputed_for_it():
    """RT 0 lies in the free slots of the last BE's only block, so that dropping this BE would empty no block."""
    decider = Decider("bros", num_blocks=2, num_host_blocks=0)
    decider.add("be0", prompt_tokens=3)
    decider.add("be1", prompt_tokens=1)
    decider.step()
    decider.add("rt0", prompt_tokens=1)
    assert decider.step() == {"rt0": 1, "be0": 1, "be1": 1}
    decider.add("rt1", prompt_tokens=3)
    assert "rt1" in decider.decide()
    assert decider.output.preempted == {"be0": "recompute"}


def test_best_effort_takes_no_blocks_of_real_time_even_if_it_starves_and_real_time_sits_out():
    """The late RT does not fit into the time that the urgent one leaves; the BE is exempt from that, but needs a block.
    """
    decider, late, best_effort = full("bros", "rt-late", "be0", num_blocks=5, be_max_wait_steps=4)
    decider.add("rt-urgent").deadline_s = decider.now_s + 0.0115
    late.deadline_s = decider.now_s + 0.001
    best_effort.last_step -= 5
    assert decider.decide() == {"rt-urgent": 1}
    assert decider.output.left_out == {"rt-late": DEADLINE, "be0": NO_BLOCKS}
    assert not decider.kv.offloaded_tokens


# -- real-time gives way to real-time ---------------------------------------------------------------------------------


def test_no_real_time_request_is_swapped_out_if_that_would_not_suffice():
    """The newcomer needs three blocks; one is free, one belongs to an RT that may give way, two to a more urgent one.
    """
    decider = Decider("bros", num_blocks=4)
    decider.add("rt-urgent", prompt_tokens=7).deadline_s = 1.0
    decider.add("rt-easy", prompt_tokens=3)
    decider.step()
    decider.scheduler.requests["rt-urgent"].deadline_s = decider.now_s + 1.0
    decider.add("rt-new", prompt_tokens=12, slo=SLO(2.0, 2.0))
    assert decider.decide() == {"rt-urgent": 1, "rt-easy": 1}
    assert decider.output.left_out == {"rt-new": NO_BLOCKS}
    assert not decider.kv.offloaded_tokens


def test_no_real_time_request_takes_the_blocks_of_a_more_urgent_one_that_sits_out():
    """A decode behind 200 tokens does not fit before the first deadline; one behind 8 tokens would."""
    decider = Decider("bros", num_blocks=53, max_num_batched_tokens=1000)
    for name, prompt_tokens in (("rt-first", 1), ("rt-long", 200), ("rt-short", 8)):
        decider.add(name, prompt_tokens)
    decider.step()
    for name, residual_s in (("rt-first", 0.0125), ("rt-long", 1.0), ("rt-short", 2.0)):
        decider.scheduler.requests[name].deadline_s = decider.now_s + residual_s
    assert decider.decide() == {"rt-first": 1}
    assert decider.output.left_out == {"rt-long": DEADLINE, "rt-short": NO_BLOCKS}


@pytest.mark.parametrize(("arrivals_s", "runs"), [((0.0, 1.0), "rt-a"), ((1.0, 0.0), "rt-b"), ((0.0, 0.0), "rt-a")])
@pytest.mark.parametrize("names", [("rt-a", "rt-b"), ("rt-b", "rt-a")])
def test_of_two_with_the_same_deadline_the_later_one_gives_way_then_the_greater_id(names, arrivals_s, runs):
    """Whichever is asked first."""
    decider, *requests = full("bros", *names, num_blocks=4)
    for request in requests:
        request.arrival_s = arrivals_s[request.request_id == "rt-b"]
        request.deadline_s = decider.now_s + 5.0
    assert decider.decide() == {runs: 1}
    assert len(decider.output.preempted) == 1


def test_a_request_that_is_in_the_batch_gives_way_to_nobody():
    """The late wait in order of arrival, so that one of them may have an earlier deadline than one that runs."""
    decider, running = full("bros", "rt-running", num_blocks=3)
    running.deadline_s = decider.now_s + 0.005
    decider.add("rt-waiting", prompt_tokens=8).deadline_s = decider.now_s + 0.001
    assert decider.decide() == {"rt-running": 1}
    assert decider.output.left_out == {"rt-waiting": NO_BLOCKS}


def test_a_request_that_has_given_all_its_blocks_already_is_passed_over():
    decider, swapped, _ = full("bros", "rt-swapped", "rt-holding", num_blocks=4)
    assert decider.kv.swap_out("rt-swapped")
    swapped.deadline_s = decider.now_s + 9e6
    decider.add("rt-new", prompt_tokens=12, slo=SLO(1.0, 1.0))
    assert decider.decide() == {"rt-new": 12}
    assert decider.output.preempted == {"rt-holding": "swap"}


@pytest.mark.parametrize(("safety", "residual_s", "comes_back"), [
    (1.0, 0.0515, False), (1.0, 0.0505, True), (1.5, 0.0770, False), (1.5, 0.0760, True)])
def test_a_lazy_request_waits_as_long_as_two_iterations_leave_it_the_time_that_it_needs_alone(
        safety, residual_s, comes_back):
    """Two iterations of 20 ms, and 11.08 ms for its token: 51.1 ms, or 76.6 ms with the safety factor."""
    decider, waiting, holding = full("bros+lazy", "rt-waiting", "rt-holding", num_blocks=4)
    assert decider.kv.swap_out("rt-waiting")
    decider.add("be-filler", prompt_tokens=8)
    holding.deadline_s = decider.now_s + 0.2
    decider.scheduler.iteration_s, decider.latency.safety = 0.020, safety
    waiting.deadline_s = decider.now_s + residual_s
    assert ("rt-waiting" in decider.decide()) is comes_back


@pytest.mark.parametrize(("residual_s", "gives_way"), [(0.5, False), (0.75, True)])
def test_a_lazy_newcomer_spares_those_that_cannot_wait_longer_than_its_ttft(residual_s, gives_way):
    decider, holding = full("bros+lazy", "rt-holding", num_blocks=2)
    decider.now_s = 1.0
    holding.deadline_s = 1.0 + residual_s
    decider.add("rt-new", slo=SLO(0.5, 9.0), arrival_s=0.9)
    assert ("rt-new" in decider.decide()) is gives_way


def test_real_time_is_never_cut_to_the_blocks_there_are():
    """Three blocks are free, and the holder of the others is more urgent: a chunk of 16 tokens waits for four."""
    decider = Decider("bros-plus", num_blocks=8, max_num_batched_tokens=32)
    holder = decider.add("rt-holder", prompt_tokens=17)
    decider.step()
    holder.deadline_s = decider.now_s + 1.0
    decider.add("rt-new", prompt_tokens=16, slo=SLO(9.0, 9.0))
    assert decider.decide() == {"rt-holder": 1}
    assert decider.output.left_out == {"rt-new": NO_BLOCKS}


# -- the last seat, and offers to the starving ------------------------------------------------------------------------


def test_the_one_that_stood_aside_is_told_why_it_cannot_take_the_last_seat_either():
    """One block is free, which the other RT takes; then there is none for the BE either."""
    decider, urgent, _ = full("bros", "rt-urgent", "be0", num_blocks=5, max_num_seqs=2)
    urgent.deadline_s = decider.now_s + 1.0
    decider.add("rt-aside", prompt_tokens=20, slo=SLO(9.0, 9.0))
    assert decider.decide() == {"rt-urgent": 1}
    assert decider.output.left_out == {"be0": NO_BLOCKS, "rt-aside": NO_BLOCKS}


def test_a_starving_request_is_offered_a_place_once_per_step():
    """It finds no blocks, before the late RT are asked; nor would it afterwards."""
    decider, best_effort, late = full("bros", "be0", "rt-late", num_blocks=5, be_max_wait_steps=4)
    decider.scheduler.config = replace(decider.scheduler.config, max_num_seqs=2)
    decider.add("rt-urgent").deadline_s = decider.now_s + 0.0115
    late.deadline_s = decider.now_s + 0.001
    best_effort.last_step -= 5
    try_admit, offers = decider.scheduler.try_admit, []

    def noted(request, step_budget_s, exempt=False):
        offers.append((request.request_id, exempt))
        return try_admit(request, step_budget_s, exempt)

    decider.scheduler.try_admit = noted
    assert decider.decide() == {"rt-urgent": 1}
    assert offers.count(("be0", True)) == 1
