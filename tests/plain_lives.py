"""Requests as plain numbers, for oracles of scheduling rules: blocks are counted, and a batch is a dictionary.

An oracle adds the order in which requests are tried and shares nothing with the policy but the latency model;
`run_beside` steps both through the same life."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from decisions import Decider
from harness import accepted_budget

from bros_ref.request import SLO


@dataclass
class Life:
    """What an oracle knows of a request; `name` begins with its class."""

    name: str
    prompt: int
    output: int
    arrival_s: float
    ttft_s: float
    tpot_s: float
    computed: int = 0
    made: int = 0
    blocks: int = 0
    first_s: float | None = None
    last_s: float | None = None
    last_step: int = 0

    @property
    def is_rt(self):
        return self.name.startswith("rt")

    @property
    def left(self):
        return self.prompt + self.made - self.computed


@dataclass
class Oracle:
    """The machine under a rule. Subclasses give `pack`, and `victim_for` if they preempt."""

    latency: object
    free: int
    block_size: int
    seats: int
    budget: int
    chunked: bool = True
    running: list = field(default_factory=list)
    waiting: list = field(default_factory=list)
    batch: dict = field(default_factory=dict)
    preempted: list = field(default_factory=list)
    rejected: list = field(default_factory=list)
    num_steps: int = 0

    def __post_init__(self):
        self.num_blocks = self.free

    def add(self, life):
        life.last_step = self.num_steps
        self.waiting.append(life)

    def step(self, now_s):
        self.num_steps += 1
        self.batch, self.preempted, self.rejected = {}, [], []
        self.pack(now_s)
        return self.batch

    def blocks_of(self, tokens):
        return -(-tokens // self.block_size)

    @property
    def tokens(self):
        return sum(self.batch.values())

    def executing_s(self):
        """What the batch takes so far."""
        return self.latency.c0 + sum(self.latency.cost_s(count, life.computed) for life in self.running
                                     if (count := self.batch.get(life.name)))

    def run(self, life, tokens):
        """Puts tokens of a life into the batch if it finds blocks, taking those of victims; False if it does not."""
        while (missing := self.blocks_of(life.computed + tokens) - life.blocks) > self.free:
            victim = self.victim_for(life)
            if victim is None:
                return False
            self.recompute(victim)
            if victim is life:
                return False
        self.free -= missing
        life.blocks += missing
        self.batch[life.name] = tokens
        life.last_step = self.num_steps
        if life in self.waiting:
            self.waiting.remove(life)
            self.running.append(life)
        return True

    def recompute(self, victim):
        self.free += victim.blocks
        victim.blocks = victim.computed = 0
        self.running.remove(victim)
        self.batch.pop(victim.name, None)
        self.preempted.append(victim.name)
        self.send_back(victim)

    def send_back(self, victim):
        self.waiting.insert(0, victim)

    def complete(self, now_s, duration_s):
        for life in list(self.running):
            life.computed += self.batch.get(life.name, 0)
            if life.name in self.batch and life.left == 0:
                life.made += 1
                life.last_s = now_s
                life.first_s = now_s if life.first_s is None else life.first_s
                if life.made == life.output:
                    self.free += life.blocks
                    self.running.remove(life)


class V0Oracle(Oracle):
    """vLLM V0: steps of whole prompts before steps of decodes, a watermark of 1 %, the newest gives way."""

    chunked = False

    def fits(self, life):
        need = self.blocks_of(life.prompt + life.made)
        return need <= self.free and (not self.running or self.free - need >= self.num_blocks // 100)

    def takes_prompt(self, life):
        """Whole prompts within the budget; one longer than it is the only one of its step."""
        if life.left == 1:
            return self.tokens < self.budget
        return self.tokens + life.left <= self.budget or all(count == 1 for count in self.batch.values())

    def pack(self, now_s):
        while self.waiting and len(self.running) < self.seats:
            life = self.waiting[0]
            if not (self.takes_prompt(life) and self.fits(life)):
                break
            assert self.run(life, life.left)
        if not self.batch:
            self.decode(list(self.running))

    def decode(self, chosen):
        for life in chosen:
            if life in self.running and self.tokens < self.budget:
                self.run(life, 1)

    def victim_for(self, life):
        return self.running[-1] if life in self.running else None


# Targets that no sum of step times meets exactly: at a tie, rounding would decide, and differently on each side.
ODD_SLOS = ((0.313711, 0.051713), (0.109313, 0.021107), (3.000917, 0.413709))


def run_beside(oracle_type, policy, seed, *, steps=60, arrivals=0.4, slos=ODD_SLOS, **sizes):
    """Steps policy and oracle through the same random life and compares every decision. Returns the numbers of
    preemptions and rejections."""
    rng = random.Random(seed)
    num_blocks, block_size, seats = (sizes[name] for name in ("num_blocks", "block_size", "seats"))
    budget = accepted_budget(policy, seats, sizes["budget"])
    decider = Decider(policy, num_blocks, block_size, max_num_seqs=seats, max_num_batched_tokens=budget,
                      chunked_prefill=oracle_type.chunked)
    oracle = oracle_type(decider.latency, num_blocks, block_size, seats, budget)
    longest, preempted, rejected = num_blocks * block_size, 0, 0
    for step in range(steps):
        if rng.random() < arrivals:
            prompt = rng.randint(1, longest - 1)
            output, slo = rng.randint(1, longest - prompt), rng.choice(slos)
            name = f"{rng.choice(['rt', 'be'])}{step}"
            request = decider.add(name, prompt, output, SLO(*slo), arrival_s=decider.now_s - 0.03 * rng.random())
            oracle.add(Life(name, prompt, output, request.arrival_s, *slo))
        expected = oracle.step(decider.now_s)
        decided = decider.decide()
        assert list(decided.items()) == list(expected.items()), f"step {step}"
        assert list(decider.output.preempted) == oracle.preempted, f"step {step}"
        assert decider.output.rejected == oracle.rejected, f"step {step}"
        preempted += len(oracle.preempted)
        rejected += len(oracle.rejected)
        before_s = decider.now_s
        decider.compute()
        if not expected:
            decider.now_s += 0.01
        oracle.complete(decider.now_s, decider.now_s - before_s)
    return preempted, rejected
