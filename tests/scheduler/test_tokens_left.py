"""Real-time prompts that have time leave the tokens of a step to best-effort requests that decode."""

from dataclasses import replace

import pytest
from decisions import Decider
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.request import SLO

STEP = (0.1, 0.01, 0.0, 0.0)  # seconds for a step, and for each token


def prefilling(policy, num_be, prompt_tokens, ttft_s, budget=16, **limits):
    """A decider in which `num_be` best-effort requests decode as a real-time prompt arrives, and that request."""
    decider = Decider(policy, num_blocks=400, coefficients=STEP, max_num_batched_tokens=budget, max_num_seqs=32,
                      **limits)
    for index in range(num_be):
        decider.add(f"be{index}", 1, 1000)
    for _ in range(-(-num_be // budget)):
        decider.step()
    return decider, decider.add("rt", prompt_tokens, 2, SLO(ttft_s, 10.0))


def first_steps(decider, request, most=500):
    """Decisions until the request's first token."""
    decided = []
    while request.first_token_s is None:
        assert len(decided) < most
        decided.append(decider.step())
    return decided


@pytest.mark.parametrize(("policy", "num_decoding"), [("bros-plus", 4), ("bros+chunks", 0)])
def test_decodes_run_beside_a_long_prompt_that_has_time(policy, num_decoding):
    decider, rt = prefilling(policy, 4, 120, ttft_s=100.0)
    decided = first_steps(decider, rt)
    assert [step["rt"] for step in decided[:-1]] == [16 - num_decoding] * (len(decided) - 1), "the step is full"
    assert all(len(step) == 1 + num_decoding for step in decided[:-1])
    assert rt.first_token_s - rt.arrival_s <= 100.0


def needed_s(num_tokens, num_decoding, budget=16):
    """Of a prompt and of a typical one behind it, which is the same, in steps beside the decodes."""
    return -(-2 * num_tokens // (budget - num_decoding)) * (0.1 + 0.01 * num_decoding) + 0.01 * 2 * num_tokens


@pytest.mark.parametrize(("more_s", "num_decoding"), [(1e-6, 4), (-1e-6, 0)])
def test_a_prompt_that_has_no_time_takes_all_tokens(more_s, num_decoding):
    decider, rt = prefilling("bros-plus", 4, 120, ttft_s=needed_s(120, 4) + more_s)
    assert decider.step() == {"rt": 16 - num_decoding, **{f"be{index}": 1 for index in range(num_decoding)}}
    first_steps(decider, rt)
    assert rt.first_token_s - rt.arrival_s <= rt.slo.ttft_s


def test_at_most_half_of_the_tokens_are_left():
    decider, _ = prefilling("bros-plus", 12, 120, ttft_s=1000.0)
    assert decider.step()["rt"] == 8


def test_no_more_are_left_than_seats():
    decider, _ = prefilling("bros-plus", 6, 120, ttft_s=1000.0)
    decider.scheduler.begin_step()
    decider.scheduler.max_batch_size = 4
    assert decider.scheduler._tokens_left_to_be(list(decider.scheduler._rt_waiting), [], decider.now_s) == 3


def test_nothing_is_left_while_an_rt_is_late_or_none_has_a_prompt():
    decider, rt = prefilling("bros-plus", 4, 120, ttft_s=1000.0)
    scheduler = decider.scheduler
    scheduler.begin_step()
    assert scheduler._tokens_left_to_be([rt], [], decider.now_s) == 4
    assert scheduler._tokens_left_to_be([rt], [rt], decider.now_s) == 0
    assert scheduler._tokens_left_to_be([], [], decider.now_s) == 0
    scheduler._rt_late.push(rt)
    assert scheduler._tokens_left_to_be([rt], [], decider.now_s) == 0


def test_nothing_is_left_for_those_whose_tokens_have_to_come_back_first():
    decider, rt = prefilling("bros-plus", 4, 120, ttft_s=1000.0)
    decider.scheduler.begin_step()
    decider.kv.offloaded_tokens["be1"] = 1
    assert decider.scheduler._tokens_left_to_be([rt], [], decider.now_s) == 3


@given(num_be=st.integers(0, 14), prompts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
       slack_s=st.floats(0, 20), budget=st.integers(2, 24))
def test_who_would_be_on_time_without_the_rule_is_on_time_with_it(num_be, prompts, slack_s, budget):
    """Prompts that arrive together and are due together; without the rule they run with `bros-plus` less the rule."""
    def on_time(leaves_tokens):
        decider, first = prefilling("bros-plus", num_be, prompts[0], ttft_s=1e9, budget=budget)
        decider.scheduler.config = replace(decider.scheduler.config, rt_leaves_tokens=leaves_tokens)
        due_s = sum(0.1 + 0.11 * tokens for tokens in prompts) / 4 + slack_s
        decider.abort(first)
        requests = [decider.add(f"rt{index}", tokens, 1, SLO(due_s, 10.0)) for index, tokens in enumerate(prompts)]
        for request in requests:
            first_steps(decider, request)
        return sum(request.first_token_s - request.arrival_s <= due_s for request in requests)

    assert on_time(True) >= on_time(False)
