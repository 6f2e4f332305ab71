"""What several tests need: an engine over the ChecksumModel in virtual time, random workloads, and a driver that adds
requests as they arrive, aborts some, and checks the accounts after every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext, suppress

import torch

from bros_ref.clock import VirtualClock
from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.engine import LLMEngine, Runner, StepFailed
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.model.checksum import VOCAB_SIZE, ChecksumModel, next_token
from bros_ref.model.tokenizer import ByteTokenizer
from bros_ref.request import SLO, Request, RequestClass, RequestStatus, SamplingParams
from bros_ref.scheduler import make_scheduler
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.scheduler.output import SchedulerOutput
from bros_ref.trace import Trace

TOY_LATENCY = (0.010, 0.001, 0.00001, 0.00001)  # seconds: step, token, prefill pair, context token


class VirtualTimeRunner:
    """The real runner, but each step takes exactly the time that the toy latency model says."""

    def __init__(self, runner: ModelRunner, clock: VirtualClock) -> None:
        self.runner, self.clock = runner, clock
        self.truth = StepLatencyModel(TOY_LATENCY, restore_s_per_token=0.0005)

    def execute(self, output: SchedulerOutput) -> list[int | None]:
        result = self.runner.execute(output)
        self.clock.advance(self.truth.predict(output.features))
        return result


def checksum_engine(policy: str, num_blocks: int = 12, block_size: int = 4, num_host_blocks: int | None = None,
                    **limits: object) -> LLMEngine:
    """An engine in virtual time whose tokens are exact checksums of the K/V it sees."""
    kv_config = KVCacheConfig(num_blocks, block_size, num_host_blocks)
    config = SchedulerConfig(**{"max_num_seqs": 6, "max_num_batched_tokens": 64, **limits})  # type: ignore[arg-type]
    clock = VirtualClock()
    scheduler = make_scheduler(policy, config, kv_config, StepLatencyModel(TOY_LATENCY, 0.0005))
    runner = VirtualTimeRunner(ModelRunner(ChecksumModel(), kv_config, dtype=torch.int64), clock)
    trace = Trace(policy, "checksum", "cpu", num_blocks, block_size, 16, 0)
    return LLMEngine(scheduler, runner, clock, trace=trace)


def make_request(name: str, is_rt: bool, prompt: Sequence[int], max_tokens: int, arrival_s: float = 0.0,
                 slo: SLO | None = None) -> Request:
    return Request(name, RequestClass.REAL_TIME if is_rt else RequestClass.BEST_EFFORT, list(prompt),
                   SamplingParams(max_tokens=max_tokens), arrival_s, (slo or SLO(0.2, 0.05)) if is_rt else None)


def accepted_budget(policy: str, seats: int, budget: int) -> int:
    """Tokens of a step that the policy accepts: vLLM refuses fewer tokens than seats."""
    return max(budget, seats) if policy.startswith("vllm-") else budget


def random_requests(rng: random.Random, count: int, longest: int, block_size: int, spread_s: float) -> list[Request]:
    """Lengths favour block borders; arrivals are spread over `spread_s` seconds."""
    requests = []
    for i in range(count):
        border = rng.choice([1, block_size - 1, block_size, block_size + 1, 2 * block_size, longest // 2])
        prompt_tokens = max(1, min(border, longest - 1))
        max_tokens = rng.randint(1, max(1, min(longest - prompt_tokens, 3 * block_size)))
        is_rt = rng.random() < 0.5
        slo = SLO(rng.choice([0.02, 0.1, 0.5]), rng.choice([0.012, 0.05, 0.2]))
        prompt = rng.choices(range(VOCAB_SIZE), k=prompt_tokens)
        requests.append(make_request(f"{'rt' if is_rt else 'be'}{i}", is_rt, prompt, max_tokens,
                                     rng.uniform(0, spread_s) if rng.random() < 0.7 else 0.0, slo))
    return sorted(requests, key=lambda request: request.arrival_s)


def run(engine: LLMEngine, requests: list[Request], rng: random.Random | None = None, abort_rate: float = 0.0,
        max_steps: int = 20_000) -> None:
    """Serves to the end, checking the accounts after every step. With `rng`, aborts at random moments. Steps of a
    `FailingRunner` may fail."""
    clock = engine.clock
    pending = list(requests)
    for _ in range(max_steps):
        while pending and pending[0].arrival_s <= clock.now_s():
            engine.add_request(pending.pop(0))
        if rng is not None and engine.has_unfinished and rng.random() < abort_rate:
            assert engine.abort(rng.choice(sorted(engine.scheduler.requests)))
            check_accounts(engine)
        if not engine.has_unfinished:
            if not pending:
                return
            clock.sleep_until(pending[0].arrival_s)
            continue
        with suppress(StepFailed) if isinstance(engine.runner, FailingRunner) else nullcontext():
            engine.step()
        check_accounts(engine)
    raise AssertionError(f"not done after {max_steps} steps: {sorted(engine.scheduler.requests)}")


def check_accounts(engine: LLMEngine) -> None:
    """Between two steps: the blocks add up, every RUNNING request's KV holds exactly its computed tokens and a WAITING
    one's holds none, and a request left out of the last step did not run in it."""
    scheduler, output = engine.scheduler, engine.scheduler.output
    scheduler.kv.check_integrity()
    for request in scheduler.requests.values():
        sequence = scheduler.kv._sequences.get(request.request_id)
        stored = None if sequence is None else sequence.num_slots
        expected = request.num_computed_tokens if request.status is RequestStatus.RUNNING else None
        assert stored == expected, f"{request.request_id}, {request.status}: {stored} tokens stored, not {expected}"
    running = [request for request in scheduler.requests.values() if request.status is RequestStatus.RUNNING]
    assert sorted(map(id, scheduler.running)) == sorted(map(id, running))
    assert not output.left_out.keys() & {request.request_id for request in output.requests}
    assert output.num_behind >= 0
    assert len(output.requests) <= scheduler.config.max_num_seqs


class FailingRunner:
    """Raises in a share of the steps, half of them before anything was copied, half after everything was computed."""

    def __init__(self, runner: Runner, rng: random.Random, rate: float = 0.1) -> None:
        self.runner, self.rng, self.rate = runner, rng, rate

    def execute(self, output: SchedulerOutput) -> Sequence[int | None]:
        luck = self.rng.random()
        if luck < self.rate / 2:
            raise RuntimeError("before the copies")
        result = self.runner.execute(output)
        if luck < self.rate:
            raise RuntimeError("after the forward pass")
        return result


def alone(request: Request) -> list[int]:
    """The tokens that the request gets when it is the only one, computed without an engine or a cache."""
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[request.num_prompt_tokens:]


def byte_engine(policy="bros", **limits):
    """A checksum engine whose tokens are read as bytes, so that text callbacks can be tested."""
    plain = checksum_engine(policy, num_blocks=20, **limits)
    return LLMEngine(plain.scheduler, plain.runner, plain.clock, ByteTokenizer(), plain.trace)
