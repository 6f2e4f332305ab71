"""One small decision for each line of BROS's rules, second part: who is late, what the output says, shortage.

Times are those of `test_bros_lines.py`.
"""

import pytest
from decisions import Decider

from bros_ref.request import SLO, RequestStatus
from bros_ref.trace import BATCH_CAP, DEADLINE, NO_BLOCKS, TOKEN_BUDGET

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


def test_pending_real_time_goes_by_deadline_whoever_came_first():
    decider = Decider("bros")
    for i in range(3):
        decider.add(f"rt{i}")
    decider.step()
    for i, residual_s in enumerate((2.0, 3.0, 1.0)):
        decider.scheduler.requests[f"rt{i}"].deadline_s = decider.now_s + residual_s
    assert list(decider.decide()) == ["rt2", "rt0", "rt1"]


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
    decider.scheduler.restart()
    assert [request.num_preemptions for request in (*running, waiting)] == [2, 2, 0]


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


@pytest.mark.parametrize("is_pending", [False, True])
def test_the_one_that_stood_aside_is_bound_by_real_time_alone(is_pending):
    """No BE may slow RT down at all; that is no reason to keep an RT out."""
    decider = Decider("bros", max_num_seqs=2, rt_slowdown=1.0)
    decider.add("be0")
    if is_pending:
        decider.step()
    for i in range(2):
        decider.add(f"rt{i}")
    assert list(decider.decide()) == ["rt0", "rt1"]
    assert decider.output.left_out == {"be0": DEADLINE}


def test_the_only_seat_is_left_to_nobody():
    decider = Decider("bros", max_num_seqs=1)
    decider.add("be0")
    decider.add("rt0")
    assert decider.decide() == {"rt0": 1}


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


@pytest.mark.parametrize("is_starving", [False, True])
def test_a_least_chunk_is_taken_by_an_empty_batch_and_by_the_starving_whatever_it_takes(is_starving):
    """2.5 ms are left: for two tokens in an empty batch, for less than one beside an RT."""
    decider = Decider("bros-plus", num_blocks=100, be_max_wait_steps=4)
    request = decider.add("be0", prompt_tokens=40)
    if is_starving:
        decider.add("rt0").deadline_s = 0.0125
        request.last_step -= 5
    else:
        decider.abort(decider.add("rt-typical", prompt_tokens=20, slo=SLO(0.0445, 1.0)))
    assert decider.decide() == ({"rt0": 1, "be0": 16} if is_starving else {"be0": 16})
    assert decider.output.step_budget_s == pytest.approx(0.0125)


def test_a_prompt_that_finds_no_tokens_left_is_refused_for_that():
    decider = Decider("bros-plus", max_num_batched_tokens=8)
    for i in range(2):
        decider.add(f"be{i}", prompt_tokens=8)
    assert decider.decide() == {"be0": 8}
    assert decider.output.left_out == {"be1": TOKEN_BUDGET}


def test_copies_ordered_before_a_step_that_runs_nobody_are_made_in_the_next():
    decider = Decider("bros")
    decider.add("be0", prompt_tokens=8)
    decider.step()
    assert decider.kv.swap_out("be0")
    pack, decider.scheduler.pack = decider.scheduler.pack, lambda now_s: None
    assert not decider.decide()
    assert not decider.output.kv_changes.copies
    decider.scheduler.pack = pack
    assert decider.decide() == {"be0": 1}
    assert len(decider.output.kv_changes.copies.checkpoint) == 8


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
