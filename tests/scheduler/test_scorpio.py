"""SCORPIO's published rules: rejection by prefill time, the virtual batch size, admission through a gate, credits."""

import pytest
from decisions import Decider
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_lives import V0Oracle, run_beside

from bros_ref.request import SLO, RequestStatus
from bros_ref.scheduler.baselines.scorpio import BE_TPOT_S, hopeless, keeps_tpot, prefill_s, virtual_batch_size
from bros_ref.scheduler.latency_model import StepLatencyModel

LATENCY = StepLatencyModel((0.010, 0.001, 0.0, 0.00001))  # 10 ms a step, 1 ms per token


class ScorpioOracle(V0Oracle):
    """On top of V0's steps: which requests are rejected, not admitted yet, or left out of a step."""

    def __post_init__(self):
        super().__post_init__()
        self.credits, self.loosest = {}, BE_TPOT_S

    def add(self, life):
        super().add(life)
        self.loosest = max(self.loosest, life.tpot_s if life.is_rt else 0)

    def remaining(self, life, now_s):
        if not life.is_rt:
            return float("inf")
        return life.ttft_s - (now_s - life.arrival_s) if life.first_s is None else float("-inf")

    def tpot(self, life):
        return life.tpot_s if life.is_rt else self.loosest

    def passes_gate(self, life):
        batch = [*self.running, life]
        tightest = min(map(self.tpot, batch))
        size = sum(tightest / self.tpot(other) for other in batch)
        length = sum(2 * other.prompt + other.output for other in batch) / len(batch)
        step_s = self.latency.c0 + self.latency.c1 * size + 0.5 * self.latency.c3 * size * length
        return not self.running or step_s * 1.3 < 0.99 * tightest

    def send_back(self, victim):
        super().send_back(victim)
        self.credits.pop(victim.name)

    def pack(self, now_s):
        ahead = 0
        for life in list(self.waiting):
            if life.is_rt and life.first_s is None:
                ahead += life.prompt
                if self.remaining(life, now_s) < self.latency.c0 + self.latency.c1 * max(ahead, 128) + 0.05:
                    ahead -= life.prompt
                    self.waiting.remove(life)
                    self.rejected.append(life.name)
        self.waiting.sort(key=lambda life: (self.remaining(life, now_s), life.arrival_s))
        for life in list(self.waiting):
            if len(self.running) == self.seats or not self.passes_gate(life):
                break
            if not (self.takes_prompt(life) and self.fits(life)):
                break
            assert self.run(life, life.left)
        if not self.batch and self.running:
            tightest = min(map(self.tpot, self.running))
            chosen = []
            self.credits = {life.name: self.credits.get(life.name, 0) for life in self.running}
            for life in self.running:
                self.credits[life.name] += tightest / self.tpot(life)
                if self.tpot(life) == tightest or self.credits[life.name] > 1 - 1e-9:
                    self.credits[life.name] -= 1
                    chosen.append(life)
            self.decode(chosen)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 16), block_size=st.sampled_from([2, 4, 16]),
       seats=st.integers(1, 6), budget=st.sampled_from([8, 64]))
def test_scorpio_decides_as_the_oracle_in_every_step(seed, num_blocks, block_size, seats, budget):
    run_beside(ScorpioOracle, "scorpio", seed, num_blocks=num_blocks, block_size=block_size, seats=seats, budget=budget)


def test_the_oracle_lives_meet_shortage_and_rejections():
    sizes = {"num_blocks": 8, "block_size": 4, "seats": 4, "budget": 64,
             "slos": ((0.253711, 0.051713), (9.000917, 0.413709))}
    found = [run_beside(ScorpioOracle, "scorpio", seed, **sizes) for seed in range(20)]
    assert sum(preempted for preempted, _ in found) > 10
    assert sum(rejected for _, rejected in found) > 10


def test_a_prefill_is_flat_up_to_theta_and_linear_beyond():
    assert [prefill_s(LATENCY, tokens) for tokens in (1, 128, 129, 1000)] == pytest.approx([0.138, 0.138, 0.139, 1.01])


def test_the_walk_rejects_who_cannot_make_it_and_those_delay_nobody():
    """W(200) = 0.21 s, W(500) = 0.51 s; 50 ms are kept in hand."""
    assert hopeless([(200, 0.27), (300, 0.57)], LATENCY) == [False, False]
    assert hopeless([(200, 0.25), (300, 0.57)], LATENCY) == [True, False]
    assert hopeless([(200, 0.27), (300, 0.55)], LATENCY) == [False, True]
    assert hopeless([(200, 0.27), (300, 0.55), (300, 0.57)], LATENCY) == [False, True, False]
    assert hopeless([], LATENCY) == []


def test_a_loose_request_counts_for_less_than_one():
    assert virtual_batch_size([0.05]) == 1
    assert virtual_batch_size([0.05, 0.05, 0.05]) == 3
    assert virtual_batch_size([0.05, 0.1, 0.2]) == pytest.approx(1.75)


def test_the_gate_keeps_the_tightest_tpot():
    """One request of 100 + 200 tokens: contexts of 200 on average; 10 + 1 + 2 ms, times 1.3, against 0.99 of the
    target."""
    assert not keeps_tpot([0.0170], [(100, 200)], LATENCY)
    assert keeps_tpot([0.0171], [(100, 200)], LATENCY)
    assert not keeps_tpot([0.0171] * 2, [(100, 200)] * 2, LATENCY)
    assert keeps_tpot([0.0172, 10.0], [(100, 200)] * 2, LATENCY), "the loose one hardly counts"


def test_a_rejection_ends_the_request_and_is_told():
    decider = Decider("scorpio")
    hopeless_one = decider.add("rt0", prompt_tokens=30, slo=SLO(0.1, 1.0))
    decider.add("rt1", prompt_tokens=30, slo=SLO(0.5, 1.0))
    assert decider.step() == {"rt1": 30}
    assert decider.output.rejected == ["rt0"]
    assert hopeless_one.status is RequestStatus.ABORTED
    assert decider.scheduler.requests.keys() == {"rt1"}


def test_best_effort_is_never_rejected_and_waits_behind_real_time():
    decider = Decider("scorpio", max_num_batched_tokens=30)
    decider.add("be0", prompt_tokens=20, arrival_s=-1e4)
    decider.add("rt0", prompt_tokens=20, slo=SLO(1.0, 1.0))
    assert [decider.step(), decider.step()] == [{"rt0": 20}, {"be0": 20}]


def test_credits_let_a_loose_class_decode_in_its_share_of_steps_and_keep_its_memory():
    decider = Decider("scorpio")
    decider.add("rt0", slo=SLO(9.0, 0.2))
    decider.add("rt1", slo=SLO(9.0, 0.4))
    decider.add("rt2", slo=SLO(9.0, 0.8))
    decider.add("be0")
    decider.step()
    blocks = decider.kv.num_used_blocks
    steps = [decider.step() for _ in range(20)]
    assert [sum(name in step for step in steps) for name in ("rt0", "rt1", "rt2", "be0")] == [
        20, 10, 5, 5], "best-effort work is of the loosest class"
    assert decider.kv.num_used_blocks >= blocks
    assert not decider.output.preempted
