"""Real-time prompts that cannot all be on time: as many as possible are, and the others come next."""

from itertools import combinations

import pytest
from decisions import Decider
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.request import SLO


def triaged(prompts, budget=10**6):
    """The ids kept and given up of (tokens, deadline in seconds), where a token takes a second and a step nothing."""
    decider = Decider("bros-plus", coefficients=(0.0, 1.0, 0.0, 0.0), max_num_batched_tokens=budget)
    requests = [decider.add(f"rt{i}", tokens, slo=SLO(deadline_s, 1.0)) for i, (tokens, deadline_s) in
                enumerate(prompts)]
    kept, given_up = decider.scheduler._triage(sorted(requests, key=lambda request: request.deadline_s), 0.0)
    assert sorted([*kept, *given_up], key=lambda request: request.request_id) == requests
    return kept, given_up


def all_on_time(prompts):
    end_s = 0
    for tokens, deadline_s in sorted(prompts, key=lambda prompt: prompt[1]):
        end_s += tokens
        if end_s > deadline_s:
            return False
    return True


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=2, max_size=7))
def test_as_many_as_possible_are_kept_and_all_of_them_can_be_on_time(prompts):
    prompts = [(tokens, max(tokens, deadline_s)) for tokens, deadline_s in prompts]  # each could be, alone
    kept, _ = triaged(prompts)
    chosen = [prompts[int(request.request_id[2:])] for request in kept]
    most = max(size for size in range(len(prompts) + 1) if any(map(all_on_time, combinations(prompts, size))))
    assert len(kept) == most
    assert all_on_time(chosen)
    assert chosen == sorted(chosen, key=lambda prompt: prompt[1]), "by ascending slack, as before"


def test_the_longest_so_far_gives_way_and_not_the_one_that_would_be_late():
    kept, given_up = triaged([(9, 10), (2, 11), (3, 12)])
    assert [request.request_id for request in kept] == ["rt1", "rt2"]
    assert [request.request_id for request in given_up] == ["rt0"]


def test_nobody_is_given_up_where_all_can_be_on_time_to_the_second():
    assert triaged([(9, 9), (2, 11), (3, 14)])[1] == []


def test_each_step_that_the_prompts_need_takes_its_fixed_time():
    """Ten tokens in steps of four: three steps, of a second each, and a second for each token."""
    for deadline_s, num_given_up in ((13.0, 0), (12.9, 1)):
        decider = Decider("bros-plus", coefficients=(1.0, 1.0, 0.0, 0.0), max_num_batched_tokens=4)
        requests = [decider.add(f"rt{i}", 5, slo=SLO(deadline_s, 1.0)) for i in range(2)]
        assert len(decider.scheduler._triage(requests, 0.0)[1]) == num_given_up


def test_who_has_a_first_token_is_never_given_up():
    decider = Decider("bros-plus", coefficients=(0.0, 1.0, 0.0, 0.0), max_num_batched_tokens=10**6)
    decoding = decider.add("rt-decoding", 50, slo=SLO(60.0, 3.0))
    decider.step()
    assert decoding.first_token_s == 50.0
    requests = [decider.add(f"rt{i}", 2, slo=SLO(3.0, 3.0)) for i in range(2)]
    decoding.deadline_s = 52.0
    kept, given_up = decider.scheduler._triage([decoding, *requests], 50.0)
    assert decoding in kept
    assert len(given_up) == 1


def serve(policy):
    """Three short questions behind a long one that is due first, and a best-effort request. Returns the real-time
    requests on time, and all in the order in which they first ran."""
    decider = Decider(policy, num_blocks=400, coefficients=(0.01, 0.001, 0.0, 0.0), max_num_batched_tokens=100)
    requests = [decider.add("rt-long", 600, 4, SLO(0.70, 1.0))]
    requests += [decider.add(f"rt{i}", 50, 4, SLO(0.71, 1.0)) for i in range(3)]
    decider.add("be0", 200, 4)
    order = []
    while decider.scheduler.requests:
        order += [request_id for request_id in decider.step() if request_id not in order]
    return [request.request_id for request in requests if request.first_token_s <= request.slo.ttft_s], order


@pytest.mark.parametrize("policy", ["bros-plus", "bros+triage"])
def test_more_are_on_time_than_without_and_the_given_up_come_before_best_effort(policy):
    on_time, order = serve(policy)
    assert on_time == ["rt0", "rt1", "rt2"]
    assert order == ["rt0", "rt1", "rt2", "rt-long", "be0"]


@pytest.mark.parametrize("policy", ["bros", "bros+chunks"])
def test_without_it_the_one_due_first_makes_the_others_late(policy):
    assert len(serve(policy)[0]) < 3
