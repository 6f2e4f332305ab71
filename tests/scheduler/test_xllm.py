"""xLLM's published rules: the step's budget, urgency, the order of online requests, and offline ones dropped whole."""

import math

import pytest
from decisions import Decider
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_lives import Oracle, run_beside

from bros_ref.request import SLO
from bros_ref.scheduler.baselines.xllm import STARVING_STEPS, is_urgent, online_key, step_budget_s
from bros_ref.trace import NO_BLOCKS

MIN_CHUNK = 16  # `SchedulerConfig.min_chunk_tokens`


class XLLMOracle(Oracle):
    def due(self, life):
        return life.arrival_s + life.ttft_s if life.last_s is None else life.last_s + life.tpot_s

    def work(self, life):
        return self.latency.cost_s(life.left, life.computed)

    def victim_for(self, life):
        offline = [other for other in self.running if not other.is_rt]
        if life.is_rt and offline:
            return offline[-1]
        if life not in self.running:
            return None
        return max((other for other in self.running if other.is_rt), key=self.due) if life.is_rt else offline[-1]

    def take(self, life, budget_s):
        """Whether it was taken, in part or whole."""
        if life.name in self.preempted:
            return False
        spare_s, tokens = budget_s / self.latency.safety - self.executing_s(), life.left
        if tokens == 1:
            if self.batch and (self.tokens >= self.budget or self.latency.cost_s(1, life.computed) > spare_s):
                return False
        else:
            room = max(self.budget - self.tokens, 0 if self.batch else MIN_CHUNK)
            tokens = min(tokens, room)
            if tokens <= 0:
                return False
            if spare_s < math.inf:
                smallest = min(tokens, MIN_CHUNK)
                fitting = self.latency.max_new_tokens(spare_s, life.computed)
                if fitting < tokens:
                    tokens = fitting if self.batch else max(fitting, smallest)
                    if tokens < smallest:
                        return False
        if life in self.waiting:
            held = sum(other.blocks for other in self.running if not other.is_rt)
            if self.blocks_of(life.prompt + life.made) > self.free + (held if life.is_rt else 0):
                return False
        return self.run(life, tokens)

    def pack(self, now_s):
        online = [life for life in [*self.running, *self.waiting] if life.is_rt]
        budget_s = max(min((self.due(life) - now_s for life in online), default=math.inf),
                       0.65 * min((life.tpot_s for life in online), default=math.inf))
        total_s, overhead_s = sum(map(self.work, online)), self.latency.c0
        stretch = math.inf if budget_s <= overhead_s else (
            1.0 if budget_s == math.inf else budget_s / (budget_s - overhead_s))

        def key(life):
            urgent = budget_s <= overhead_s or self.due(life) - now_s < total_s * stretch
            starving = self.num_steps - life.last_step > 64
            return (not starving, not urgent, self.work(life) if urgent else self.due(life) - now_s, life.name)

        for life in sorted(online, key=key):
            if len(self.batch) == self.seats and life.name not in self.preempted:
                return
            self.take(life, budget_s)
        for life in [life for life in self.running if not life.is_rt]:
            if len(self.batch) == self.seats and life.name not in self.preempted:
                return
            self.take(life, budget_s)
        offline = [life for life in self.waiting if not life.is_rt]
        while offline and len(self.running) < self.seats and len(self.batch) < self.seats:
            if not self.take(offline.pop(0), budget_s):
                return


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 16), block_size=st.sampled_from([2, 4, 16]),
       seats=st.integers(1, 6), budget=st.sampled_from([8, 64, 400]))
def test_xllm_decides_as_the_oracle_in_every_step(seed, num_blocks, block_size, seats, budget):
    run_beside(XLLMOracle, "xllm", seed, num_blocks=num_blocks, block_size=block_size, seats=seats, budget=budget)


def test_the_oracle_lives_meet_shortage():
    sizes = {"num_blocks": 8, "block_size": 4, "seats": 4, "budget": 64}
    assert sum(run_beside(XLLMOracle, "xllm", seed, **sizes)[0] for seed in range(10)) > 20


@pytest.mark.parametrize(("remaining_s", "tpot_s", "budget_s"), [(0.4, 0.2, 0.4), (0.1, 0.2, 0.13), (-3.0, 0.2, 0.13),
                                                                 (math.inf, math.inf, math.inf)])
def test_the_budget_is_the_least_time_but_no_less_than_a_share_of_the_least_tpot(remaining_s, tpot_s, budget_s):
    assert step_budget_s(remaining_s, tpot_s) == pytest.approx(budget_s)


def test_urgency_follows_the_load_stretched_by_the_fixed_time_of_a_step():
    """Steps of 100 ms that lose 20 ms each stretch 0.4 s of work to 0.5 s."""
    assert is_urgent(0.49, 0.4, 0.1, 0.02)
    assert not is_urgent(0.51, 0.4, 0.1, 0.02)
    assert is_urgent(9.0, 0.4, 0.02, 0.02), "no step of that budget does any work"
    assert not is_urgent(0.41, 0.4, math.inf, 0.02)


def test_the_urgent_go_by_density_the_others_by_deadline_the_starving_first():
    keys = [online_key(True, False, 9.0, 9.0), online_key(False, True, 0.1, 5.0), online_key(False, True, 0.2, 1.0),
            online_key(False, False, 9.0, 1.0), online_key(False, False, 0.1, 2.0)]
    assert keys == sorted(keys)


def test_a_waiting_online_request_drops_the_newest_offline_one_whole():
    decider = Decider("xllm", num_blocks=4)
    decider.add("be0", prompt_tokens=4)
    decider.step()
    newest = decider.add("be1", prompt_tokens=4)
    decider.step()
    decider.add("rt0", prompt_tokens=8)
    assert decider.step() == {"rt0": 8, "be0": 1}
    assert decider.output.preempted == {"be1": "recompute"}
    assert newest.num_computed_tokens == 0


def test_an_offline_newcomer_drops_nobody_and_gets_what_online_leaves():
    decider = Decider("xllm", num_blocks=4)
    decider.add("be0", prompt_tokens=10)
    decider.step()
    decider.add("be1", prompt_tokens=8)
    decider.step()
    assert (decider.output.preempted, decider.output.left_out) == ({}, {"be1": NO_BLOCKS})


def test_nobody_starves_among_the_online():
    """A long prompt is always the least dense; it runs once it has waited."""
    decider = Decider("xllm", max_num_seqs=1, max_num_batched_tokens=400, num_blocks=400)
    decider.add("rt0", prompt_tokens=200, max_tokens=1, slo=SLO(0.01, 0.01))
    for step in range(STARVING_STEPS + 2):
        decider.add(f"rt{step + 1}", prompt_tokens=2, max_tokens=1, slo=SLO(0.01, 0.01))
        if "rt0" in decider.step():
            break
    assert decider.scheduler.step == STARVING_STEPS + 1
