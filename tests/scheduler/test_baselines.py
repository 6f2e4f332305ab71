"""Each baseline does what the system it stands for does, one test a stated behaviour; for the two vLLM policies also
an oracle, written from vLLM's rules on plain numbers, which must decide the same in every step of random lives."""

import random
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
from decisions import Decider
from harness import accepted_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.request import RequestStatus
from bros_ref.scheduler import POLICIES
from bros_ref.scheduler.baselines.sglang_priority import INITIAL_NEW_TOKEN_RATIO, MIN_NEW_TOKEN_RATIO
from bros_ref.trace import BATCH_CAP, NO_BLOCKS

CHUNKED = {"chunked_prefill": True}
WAITING, RUNNING = RequestStatus.WAITING, RequestStatus.RUNNING


def ids(requests):
    return [request.request_id for request in requests]


def waiting_ids(decider):
    return {request.request_id for request in decider.scheduler.requests.values() if request.status is WAITING}


# -- vLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_only_vllm_policies_refuse_fewer_tokens_than_seats(policy):
    Decider(policy, max_num_seqs=5, max_num_batched_tokens=5)
    refused = pytest.raises(ValueError, match=f"{policy} needs .* got 4 and 5; set max_num_batched_tokens to 5 or more")
    with refused if policy.startswith("vllm-") else nullcontext():
        Decider(policy, max_num_seqs=5, max_num_batched_tokens=4)


# -- vLLM, first come first served ----------------------------------------------------------------------------------


def test_vllm_runs_in_admission_order_and_chunks_share_one_token_budget():
    decider = Decider("vllm-fcfs", max_num_batched_tokens=8, **CHUNKED)
    decider.add("be0", prompt_tokens=6)
    decider.add("be1", prompt_tokens=6)
    decider.add("rt0", prompt_tokens=3)
    steps = [list(decider.step().items()) for _ in range(3)]
    assert steps == [[("be0", 6), ("be1", 2)], [("be0", 1), ("be1", 4), ("rt0", 3)],
                     [("be0", 1), ("be1", 1), ("rt0", 1)]]


def test_vllm_fcfs_lets_no_real_time_request_overtake():
    decider = Decider("vllm-fcfs", max_num_seqs=1, **CHUNKED)
    decider.add("be0", max_tokens=3)
    decider.add("be1", max_tokens=2)
    decider.add("rt0", max_tokens=1)
    assert [ids_ for _ in range(6) for ids_ in decider.step()] == ["be0"] * 3 + ["be1"] * 2 + ["rt0"]


def test_vllm_admits_no_more_than_the_seats():
    decider = Decider("vllm-fcfs", max_num_seqs=2, max_num_batched_tokens=4, **CHUNKED)
    decider.add("be0", prompt_tokens=2)
    decider.add("be1", prompt_tokens=6)
    decider.add("be2")
    assert [decider.step() for _ in range(3)] == [{"be0": 2, "be1": 2}, {"be0": 1, "be1": 3}, {"be0": 1, "be1": 1}]
    assert waiting_ids(decider) == {"be2"}


def full_pool(policy, *names):
    """Requests of one block of 4 tokens each that fill the pool, all about to need a second one."""
    decider = Decider(policy, num_blocks=len(names), **CHUNKED)
    requests = [decider.add(name, prompt_tokens=4, max_tokens=4, arrival_s=float(order))
                for order, name in enumerate(names)]
    decider.step()
    assert decider.kv.num_free_blocks == 0
    return decider, requests


def test_vllm_preempts_the_last_of_running_which_starts_over_at_the_front_of_waiting():
    decider, (_, _, last) = full_pool("vllm-fcfs", "be0", "be1", "be2")
    decider.add("be3")
    assert list(decider.decide()) == ["be0"]  # it takes be2's block; then be1 asks, and is the last itself
    assert decider.output.preempted == {"be1": "recompute", "be2": "recompute"}
    assert decider.output.recomputed_tokens == 8
    assert (last.status, last.num_computed_tokens, last.num_preemptions) == (WAITING, 0, 1)
    decider.compute()
    while "be0" in decider.scheduler.requests:
        decider.step()
    assert list(decider.step()) == ["be1"]


def test_vllm_admits_nothing_in_a_step_with_a_preemption():
    decider, _ = full_pool("vllm-fcfs", "be0", "be1")
    decider.add("be2", prompt_tokens=1)
    assert list(decider.step()) == ["be0"]
    assert waiting_ids(decider) == {"be1", "be2"}


def test_vllm_preempts_the_one_that_asks_if_it_is_the_last():
    decider = Decider("vllm-fcfs", num_blocks=2, **CHUNKED)
    decider.add("be0", prompt_tokens=1, max_tokens=7)
    decider.add("be1", prompt_tokens=4, max_tokens=4)
    decider.step()
    assert list(decider.decide()) == ["be0"]
    assert decider.output.preempted == {"be1": "recompute"}


@pytest.mark.parametrize("policy", ["vllm-fcfs", "vllm-priority"])
def test_vllm_admits_a_prompt_only_if_all_of_it_fits(policy):
    decider = Decider(policy, num_blocks=4, max_num_seqs=4, max_num_batched_tokens=4, **CHUNKED)
    decider.add("be0", prompt_tokens=4)
    decider.step()
    decider.add("be1", prompt_tokens=13)
    decider.add("be2", prompt_tokens=1)
    decider.step()
    assert waiting_ids(decider) == {"be1", "be2"}, "the first chunk would fit, the prompt does not; nobody passes it"


# -- vLLM, priority -------------------------------------------------------------------------------------------------


def test_vllm_priority_orders_the_waiting_by_class_then_arrival():
    decider = Decider("vllm-priority", max_num_seqs=1, **CHUNKED)
    for name, arrival_s in (("be0", 0.1), ("rt1", 0.3), ("be1", 0.0), ("rt0", 0.2)):
        decider.add(name, max_tokens=1, arrival_s=arrival_s)
    assert [name for _ in range(4) for name in decider.step()] == ["rt0", "rt1", "be1", "be0"]


def test_vllm_priority_never_preempts_a_running_request_for_a_waiting_one():
    decider = Decider("vllm-priority", num_blocks=2, max_num_seqs=2, **CHUNKED)
    decider.add("be0", prompt_tokens=4, max_tokens=4)
    decider.add("be1", prompt_tokens=4, max_tokens=1)
    decider.decide()
    urgent = decider.add("rt0", prompt_tokens=1, max_tokens=1)
    decider.compute()
    decider.step()  # the pool is full: be1 has ended, be0 has taken its block
    assert (decider.output.preempted, decider.output.left_out) == ({}, {"rt0": NO_BLOCKS})
    assert urgent.status is WAITING


def test_vllm_priority_preempts_the_worst_class_and_arrival_even_if_scheduled_and_returns_its_tokens():
    decider = Decider("vllm-priority", num_blocks=3, max_num_seqs=3, max_num_batched_tokens=3, **CHUNKED)
    decider.add("be0", prompt_tokens=1, max_tokens=7)
    decider.step()
    decider.add("rt0", prompt_tokens=2, max_tokens=6)
    for _ in range(3):
        decider.step()
    assert [request.num_computed_tokens for request in decider.scheduler.running] == [4, 4], "both need a block now"
    assert decider.decide() == {"rt0": 1}, "be0 was scheduled first, with the last block; then rt0 needed one"
    assert decider.output.preempted == {"be0": "recompute"}
    assert decider.output.features.new_tokens == 1
    decider.compute()


def test_vllm_priority_ends_the_step_when_the_one_that_asks_is_the_worst():
    decider = Decider("vllm-priority", num_blocks=2, max_num_seqs=3, max_num_batched_tokens=3, **CHUNKED)
    decider.add("be0", prompt_tokens=1, max_tokens=7)
    decider.step()
    decider.add("rt0", prompt_tokens=1, max_tokens=7)
    for _ in range(3):
        decider.step()
    assert decider.decide() == {}, "be0 asks first, is the worst itself, and vLLM goes no further in this step"
    assert decider.output.preempted == {"be0": "recompute"}


def test_a_vllm_priority_request_has_its_old_place_when_it_comes_back_and_ties_go_by_id():
    decider = Decider("vllm-priority", 6, 16, max_num_seqs=3, max_num_batched_tokens=24, **CHUNKED)
    for name, prompt_tokens, max_tokens in (("rt12", 1, 17), ("be13", 51, 15), ("be14", 17, 1)):
        decider.add(name, prompt_tokens, max_tokens, arrival_s=0.0)
    preempted = []
    while "rt12" in decider.scheduler.requests:
        decider.step()
        preempted += decider.output.preempted
    assert preempted == ["be13"]
    assert decider.step() == {"be13": 24}, "both arrived at 0.0, and its id is the smaller one"


def test_an_id_may_come_back_while_its_ended_request_is_still_queued():
    decider = Decider("vllm-priority", max_num_seqs=1, **CHUNKED)
    decider.add("rt0", max_tokens=1, arrival_s=0.0)
    decider.abort(decider.add("be0", arrival_s=0.0))
    decider.add("be0", max_tokens=1, arrival_s=0.0)
    assert [list(decider.step()) for _ in range(3)] == [["rt0"], ["be0"], []]


# -- the vLLM oracle ------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """What the oracle knows of a request."""

    name: str
    prompt: int
    output: int
    arrival_s: float
    computed: int = 0
    made: int = 0
    blocks: int = 0

    @property
    def rank(self):
        return (not self.name.startswith("rt"), self.arrival_s)


@dataclass
class VLLMOracle:
    """vLLM V1's scheduling rules on plain numbers: chunked prefill, no prefix cache, whole prompts at admission.
    `reserve`: blocks that admission keeps free for those who run."""

    priority: bool
    free: int
    block_size: int
    seats: int
    budget: int
    running: list = field(default_factory=list)
    waiting: list = field(default_factory=list)
    reserve: int = 0

    def add(self, name, prompt, output, arrival_s):
        self._wait(Life(name, prompt, output, arrival_s))

    def _wait(self, life, front=False):
        self.waiting.insert(0 if front else len(self.waiting), life)
        if self.priority:
            self.waiting.sort(key=lambda other: (*other.rank, other.name))

    def _grow(self, life, tokens):
        missing = -(-(life.computed + tokens) // self.block_size) - life.blocks
        if missing > self.free:
            return False
        self.free -= missing
        life.blocks += missing
        return True

    def _drop(self, life):
        self.free += life.blocks
        life.blocks = life.computed = 0
        self.running.remove(life)

    def step(self):
        scheduled, preempted = {}, []
        for life in list(self.running):
            if life not in self.running:
                continue
            tokens = min(life.prompt + life.made - life.computed, self.budget - sum(scheduled.values()))
            if tokens == 0:
                continue
            while not (grown := self._grow(life, tokens)):
                victim = max(self.running, key=lambda other: other.rank) if self.priority else self.running[-1]
                self._drop(victim)
                scheduled.pop(victim.name, None)
                self._wait(victim, front=True)
                preempted.append(victim.name)
                if victim is life:
                    break
            if not grown:
                break
            scheduled[life.name] = tokens
        while not preempted and self.waiting and len(self.running) < self.seats:
            life, left = self.waiting[0], self.budget - sum(scheduled.values())
            needed = -(-(life.prompt + life.made) // self.block_size) + (self.reserve if self.running else 0)
            if left == 0 or needed > self.free:
                break
            tokens = min(life.prompt + life.made, left)
            assert self._grow(life, tokens)
            self.running.append(self.waiting.pop(0))
            scheduled[life.name] = tokens
        for life in list(self.running):
            life.computed += scheduled.get(life.name, 0)
            if life.name in scheduled and life.computed == life.prompt + life.made:
                life.made += 1
                if life.made == life.output:
                    self._drop(life)
        return scheduled, preempted


def decide_alike(policy, seed, num_blocks, block_size, seats, budget, reserve=0, arrivals=0.4):
    rng, budget = random.Random(seed), accepted_budget(policy, seats, budget)
    decider = Decider(policy, num_blocks, block_size, max_num_seqs=seats, max_num_batched_tokens=budget, **CHUNKED)
    oracle = VLLMOracle(policy != "vllm-fcfs", num_blocks, block_size, seats, budget, reserve=reserve)
    longest = num_blocks * block_size
    for step in range(60):
        if rng.random() < arrivals:
            prompt = rng.randint(1, longest - 1)
            name, output = f"{rng.choice(['rt', 'be'])}{step}", rng.randint(1, longest - prompt)
            arrival_s = rng.choice([0.0, 0.5, rng.random()])  # ties, too
            decider.add(name, prompt, output, arrival_s=arrival_s)
            oracle.add(name, prompt, output, arrival_s)
        decided = decider.step()
        expected, preempted = oracle.step()
        assert (list(decided.items()), list(decider.output.preempted)) == (list(expected.items()), preempted)


@pytest.mark.parametrize("policy", ["vllm-fcfs", "vllm-priority"])
@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 16), block_size=st.sampled_from([1, 2, 4]),
       seats=st.integers(1, 6), budget=st.sampled_from([1, 3, 8, 64]))
def test_vllm_decides_as_the_oracle_in_every_step(policy, seed, num_blocks, block_size, seats, budget):
    decide_alike(policy, seed, num_blocks, block_size, seats, budget)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), num_blocks=st.sampled_from([99, 100, 101, 300]), budget=st.sampled_from([32, 400]))
def test_vllm_with_a_watermark_decides_as_the_oracle_in_every_step(seed, num_blocks, budget):
    decide_alike("vllm-priority-watermark", seed, num_blocks, 1, 5, budget, reserve=num_blocks // 100, arrivals=0.8)


# -- TGI ------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_tgi_never_preempts_and_no_running_request_ever_lacks_a_block(seed):
    rng, decider = random.Random(seed), Decider("tgi", num_blocks=8)
    for step in range(60):
        if rng.random() < 0.5:
            prompt = rng.randint(1, 31)
            decider.add(f"be{step}", prompt, rng.randint(1, 32 - prompt))
        running = set(ids(decider.scheduler.running))
        decider.step()
        assert not decider.output.preempted
        assert not running & {name for name, reason in decider.output.left_out.items() if reason == NO_BLOCKS}


def test_tgi_reserves_prompt_and_output_at_admission():
    decider = Decider("tgi", num_blocks=8)
    decider.add("be0", prompt_tokens=4, max_tokens=12)
    decider.step()
    assert decider.kv.num_used_blocks == 4


def test_tgi_is_first_in_first_out_and_a_large_head_blocks_the_line():
    decider = Decider("tgi", num_blocks=8)
    decider.add("be0", prompt_tokens=4, max_tokens=4)
    decider.add("be1", prompt_tokens=20, max_tokens=12)  # all eight blocks
    decider.add("rt0", prompt_tokens=1, max_tokens=1)
    decider.step()
    assert (decider.output.left_out, waiting_ids(decider)) == ({"be1": NO_BLOCKS}, {"be1", "rt0"})


def test_tgi_prefills_in_a_step_of_its_own_while_the_decodes_wait():
    decider = Decider("tgi")
    decider.add("be0", prompt_tokens=5)
    decider.step()
    decider.add("be1", prompt_tokens=6)
    assert [decider.step(), decider.step()] == [{"be1": 6}, {"be0": 1, "be1": 1}]


# -- SGLang ---------------------------------------------------------------------------------------------------------


def test_sglang_retracts_the_last_arrived_best_effort_request_when_the_slots_are_full():
    decider = Decider("sglang-priority", max_num_seqs=2)
    decider.add("be1", arrival_s=2.0)
    decider.add("be0", arrival_s=1.0)
    decider.step()
    decider.add("rt0", prompt_tokens=3)
    assert decider.decide() == {"rt0": 3}
    assert decider.output.preempted == {"be1": "recompute"}


def test_sglang_retracts_no_real_time_request_for_a_slot():
    decider = Decider("sglang-priority", max_num_seqs=1)
    decider.add("rt0")
    decider.step()
    decider.add("rt1", arrival_s=-1.0)
    assert list(decider.step()) == ["rt0"]
    assert (decider.output.preempted, decider.output.left_out) == ({}, {"rt1": BATCH_CAP})


def test_sglang_retracts_nobody_for_a_newcomer_when_the_pool_is_full():
    decider = Decider("sglang-priority", num_blocks=4, max_num_seqs=8)
    decider.add("be0", prompt_tokens=14, max_tokens=2)
    decider.step()
    decider.add("rt0", prompt_tokens=4)
    assert list(decider.step()) == ["be0"]
    assert (decider.output.preempted, decider.output.left_out) == ({}, {"rt0": NO_BLOCKS})


def test_sglang_prefills_before_it_decodes():
    decider = Decider("sglang-priority")
    decider.add("be0", prompt_tokens=4)
    decider.step()
    decider.add("be1", prompt_tokens=4)
    assert [decider.step(), decider.step()] == [{"be1": 4}, {"be0": 1, "be1": 1}]


def step_until_preempted(decider):
    for _ in range(50):
        decider.step()
        if decider.output.preempted:
            return list(decider.output.preempted)
    raise AssertionError("nobody was preempted in 50 steps")


@pytest.mark.parametrize(("second_prompt", "num_blocks", "victim"), [(4, 3, "be1"), (1, 2, "be0")])
def test_sglang_out_of_blocks_while_decoding_retracts_among_equal_outputs_the_longest_prompt(second_prompt, num_blocks,
                                                                                             victim):
    decider = Decider("sglang-priority", num_blocks=num_blocks)
    decider.scheduler._new_token_ratio = 0.0
    decider.add("be0", prompt_tokens=3, max_tokens=5)
    decider.add("be1", prompt_tokens=second_prompt, max_tokens=4)
    assert step_until_preempted(decider) == [victim]


def test_sglang_retracts_the_one_with_less_output_whatever_its_prompt():
    decider = Decider("sglang-priority", num_blocks=3)
    decider.scheduler._new_token_ratio = 0.0
    decider.add("be0", prompt_tokens=3, max_tokens=5)
    for _ in range(3):
        decider.step()
    decider.add("be1", prompt_tokens=3, max_tokens=5)
    assert step_until_preempted(decider) == ["be1"]


def test_sglang_reserves_less_the_longer_it_decodes_and_starts_over_after_a_retraction():
    decider = Decider("sglang-priority", num_blocks=64)
    decider.add("be0", prompt_tokens=1, max_tokens=60)
    seen = []
    for _ in range(50):
        decider.step()
        seen.append(decider.scheduler._new_token_ratio)
    assert seen == sorted(seen, reverse=True)
    assert INITIAL_NEW_TOKEN_RATIO == seen[0] > seen[-1] > MIN_NEW_TOKEN_RATIO
    short = Decider("sglang-priority", num_blocks=2)
    short.scheduler._new_token_ratio = MIN_NEW_TOKEN_RATIO
    short.add("be0", prompt_tokens=3, max_tokens=5)
    short.add("be1", prompt_tokens=3, max_tokens=5)
    step_until_preempted(short)
    assert short.scheduler._new_token_ratio == INITIAL_NEW_TOKEN_RATIO


# -- BROS-RR --------------------------------------------------------------------------------------------------------


def classes(decided):
    return {name[:2] for name in decided}


def test_round_robin_alternates_between_the_classes():
    decider = Decider("bros-rr")
    for i in range(3):
        decider.add(f"rt{i}")
        decider.add(f"be{i}")
    assert [classes(decider.step()) for _ in range(6)] == [{"rt"}, {"be"}] * 3


@pytest.mark.parametrize("name", ["rt0", "be0"])
def test_round_robin_gives_an_unused_turn_away(name):
    decider = Decider("bros-rr")
    decider.add(name)
    assert [list(decider.step()) for _ in range(4)] == [[name]] * 4


def test_round_robin_takes_room_for_real_time_from_the_last_best_effort():
    decider = Decider("bros-rr", num_blocks=3)
    decider.add("be0", prompt_tokens=4)
    decider.add("be1", prompt_tokens=4)
    decider.step()
    decider.step()  # be0 has taken the last block; be1 found none and preempted itself
    assert waiting_ids(decider) == {"be1"}
    decider.add("rt0", prompt_tokens=8)
    while "rt0" in waiting_ids(decider):
        decider.step()
    assert decider.output.preempted == {"be0": "recompute"}


def test_round_robin_newcomers_of_best_effort_preempt_nobody():
    decider = Decider("bros-rr", num_blocks=2)
    decider.add("rt0", prompt_tokens=2, max_tokens=2)
    decider.add("rt1", prompt_tokens=2, max_tokens=2)
    decider.step()
    decider.add("be0", prompt_tokens=1)
    decider.step()
    assert (decider.output.preempted, waiting_ids(decider)) == ({}, {"be0"})
    assert decider.output.left_out["be0"] == NO_BLOCKS


def test_round_robin_best_effort_takes_room_from_best_effort_only():
    decider = Decider("bros-rr", num_blocks=3)
    decider.add("rt0", prompt_tokens=4)
    decider.step()
    decider.add("be0", prompt_tokens=4)
    decider.add("be1", prompt_tokens=4)
    while not decider.output.preempted:
        decider.step()
    assert decider.scheduler.requests["rt0"].status is RUNNING
    assert decider.output.preempted.keys() <= {"be0", "be1"}


# -- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_decisions(policy, seed):
    def decisions():
        rng, decider = random.Random(seed), Decider(policy, num_blocks=10)
        for step in range(40):
            if rng.random() < 0.5:
                prompt = rng.randint(1, 20)
                decider.add(f"{rng.choice(['rt', 'be'])}{step}", prompt, rng.randint(1, 40 - prompt))
            yield list(decider.step().items()), decider.output.preempted, decider.output.left_out
    assert list(decisions()) == list(decisions())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seats", [1, 2, 3])
def test_where_seats_are_full_the_head_of_the_queue_says_so(policy, seats):
    decider = Decider(policy, max_num_seqs=seats)
    for i in range(seats + 2):
        decider.add(f"be{i}", 2, 20)
    for _ in range(4):
        decider.step()
        assert waiting_ids(decider) == {f"be{seats}", f"be{seats + 1}"}
        assert decider.output.left_out.get(f"be{seats}") == BATCH_CAP
        assert set(decider.output.left_out.values()) == {BATCH_CAP}
