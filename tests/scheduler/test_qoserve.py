"""QoServe's published rules: decode deadlines, the step's total of tokens, the order of prefills, relegation."""

import math

import pytest
from decisions import Decider
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_lives import Oracle, run_beside

from bros_ref.request import SLO
from bros_ref.scheduler.baselines.qoserve import (
    BE_TTFT_S,
    TOTALS,
    decode_deadline_s,
    is_relegated,
    order_key,
    step_total,
)


class QoServeOracle(Oracle):
    throughput = 0.0

    def ttft(self, life):
        return life.ttft_s if life.is_rt else BE_TTFT_S

    def key(self, life):
        late = (life in self.waiting and self.throughput > 0
                and self.now_s + life.left / self.throughput > life.arrival_s + self.ttft(life))
        return (late, life.arrival_s + self.ttft(life) + 0.008 * life.left, not life.is_rt, life.name)

    def victim_for(self, life):
        return max(self.running, key=self.key) if life in self.running else None

    def total(self, decodes, first):
        slacks = [life.arrival_s + max(life.first_s - life.arrival_s, life.ttft_s) + life.tpot_s * (life.made + 1)
                  - self.now_s for life in decodes if life.is_rt and life.first_s is not None]
        slack, chosen, done_s = min(slacks, default=math.inf), 128, self.executing_s()
        for total in (128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2552):
            if 1.2 * (done_s + self.latency.cost_s(max(total - self.tokens, 0), first.computed)) <= slack:
                chosen = total
        return min(chosen, self.budget)

    def pack(self, now_s):
        self.now_s = now_s
        decodes = [life for life in self.running if life.left == 1]
        for life in decodes:
            if life in self.running and self.tokens < self.budget and len(self.batch) < self.seats:
                self.run(life, 1)
        candidates = sorted([*(life for life in self.running if life.left > 1), *self.waiting], key=self.key)
        limit = self.total(decodes, candidates[0]) if candidates else 0
        queue_open = True
        for life in candidates:
            newcomer = life in self.waiting
            if newcomer and (not queue_open or len(self.running) >= self.seats):
                continue
            if newcomer and (life.name in self.preempted or self.blocks_of(life.prompt + life.made) > self.free):
                queue_open = False
            elif life in self.running or newcomer:
                tokens = min(life.left, limit - self.tokens)
                if tokens > 0 and len(self.batch) < self.seats:
                    self.run(life, tokens)
            if self.tokens >= limit:
                return

    def complete(self, now_s, duration_s):
        if self.batch:
            rate = self.tokens / duration_s
            self.throughput += (0.1 if self.throughput else 1.0) * (rate - self.throughput)
        super().complete(now_s, duration_s)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 16), block_size=st.sampled_from([2, 4, 16]),
       seats=st.integers(1, 6), budget=st.sampled_from([8, 64, 4000]))
def test_qoserve_decides_as_the_oracle_in_every_step(seed, num_blocks, block_size, seats, budget):
    run_beside(QoServeOracle, "qoserve", seed, num_blocks=num_blocks, block_size=block_size, seats=seats, budget=budget)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_qoserve_chooses_chunks_as_the_oracle_does(seed):
    """Long prompts in an ample pool: the total changes with the slack."""
    run_beside(QoServeOracle, "qoserve", seed, num_blocks=400, block_size=16, seats=8, budget=4000, steps=40,
               slos=((0.513711, 0.301713), (1.009313, 0.721107), (3.000917, 1.513709)))


def test_the_oracle_lives_meet_shortage():
    sizes = {"num_blocks": 8, "block_size": 4, "seats": 4, "budget": 64}
    assert sum(run_beside(QoServeOracle, "qoserve", seed, **sizes)[0] for seed in range(10)) > 10


def test_a_decode_is_due_from_its_target_or_from_its_first_token_if_that_was_late():
    assert decode_deadline_s(10.0, 10.3, 0.5, 0.1, 1) == pytest.approx(10.7)
    assert decode_deadline_s(10.0, 10.9, 0.5, 0.1, 1) == pytest.approx(11.1)
    assert decode_deadline_s(10.0, 10.9, 0.5, 0.1, 7) == pytest.approx(11.7)


def test_the_totals_are_the_published_ones():
    assert TOTALS == (128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2552)


@pytest.mark.parametrize(("slack_s", "total"), [(math.inf, 2552), (3.07, 2552), (3.06, 2048), (1.23, 1024),
                                                (1.228, 768), (0.16, 128), (0.0, 128), (-5.0, 128)])
def test_the_total_is_the_largest_that_keeps_the_least_slack_with_a_fifth_in_hand(slack_s, total):
    assert step_total(slack_s, lambda tokens: tokens / 1000) == total


def test_remaining_work_counts_eight_milliseconds_per_token_and_relegation_goes_first():
    short, long = order_key(False, 0.0, 1.0, 100), order_key(False, 0.0, 1.0, 1000)
    assert (short, long) == ((False, pytest.approx(1.8)), (False, pytest.approx(9.0)))
    assert long < order_key(True, 0.0, 1.0, 1)


def test_who_cannot_be_on_time_is_relegated_unless_it_holds_memory():
    assert is_relegated(1.0, 200, 100.0, 2.9, holds_memory=False)
    assert not is_relegated(1.0, 200, 100.0, 3.1, holds_memory=False)
    assert not is_relegated(1.0, 200, 100.0, 2.9, holds_memory=True)
    assert not is_relegated(1.0, 200, 0.0, 2.9, holds_memory=False), "the throughput is not known yet"


def test_every_decode_runs_beside_a_chunk_and_a_relegated_request_goes_last():
    decider = Decider("qoserve", max_num_batched_tokens=20, chunked_prefill=True)
    decider.add("rt0", prompt_tokens=2, slo=SLO(9.0, 9.0))
    decider.step()
    decider.add("rt1", prompt_tokens=30, slo=SLO(1e-3, 9.0))
    decider.add("be0", prompt_tokens=25)
    assert [decider.step() for _ in range(3)] == [
        {"rt0": 1, "be0": 19}, {"rt0": 1, "be0": 6, "rt1": 13}, {"rt0": 1, "be0": 1, "rt1": 17}]


def test_a_prefill_preempts_nobody():
    decider = Decider("qoserve", num_blocks=4, chunked_prefill=True)
    decider.add("be0", prompt_tokens=12, max_tokens=4)
    decider.step()
    decider.add("rt0", prompt_tokens=8)
    assert list(decider.step()) == ["be0"]
    assert not decider.output.preempted
