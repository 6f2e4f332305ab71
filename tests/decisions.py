"""A scheduler without a model: decisions under a virtual clock, one line per step, for tests of a policy."""

from __future__ import annotations

import pytest
from harness import TOY_LATENCY

from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.request import SLO, Request, RequestClass, RequestStatus, SamplingParams
from bros_ref.scheduler import make_scheduler
from bros_ref.scheduler.latency_model import StepFeatures, StepLatencyModel
from bros_ref.scheduler.output import SchedulerOutput

EASY = SLO(1e6, 1e6)  # never binds


class Decider:
    """One policy, stepped by hand. A step takes exactly as long as the latency model says; every token is a 7."""

    def __init__(self, policy: str, num_blocks: int = 64, block_size: int = 4, num_host_blocks: int | None = None,
                 coefficients: tuple[float, ...] = TOY_LATENCY, restore_s_per_token: float = 0.0005,
                 **limits: object) -> None:
        config = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **limits})  # type: ignore[arg-type]
        self.latency = StepLatencyModel(coefficients, restore_s_per_token)
        self.truth = StepLatencyModel(coefficients, restore_s_per_token)
        self.scheduler = make_scheduler(policy, config, KVCacheConfig(num_blocks, block_size, num_host_blocks),
                                        self.latency)
        self.kv = self.scheduler.kv
        self.now_s = 0.0
        self.output = SchedulerOutput(0, 0.0)

    def add(self, name: str, prompt_tokens: int = 1, max_tokens: int = 100, slo: SLO = EASY,
            arrival_s: float | None = None) -> Request:
        """A request that arrives now; its class is what its name begins with, "rt" or "be"."""
        request = Request(name, RequestClass(name[:2]), [1] * prompt_tokens, SamplingParams(max_tokens=max_tokens),
                          self.now_s if arrival_s is None else arrival_s, slo if name.startswith("rt") else None)
        self.scheduler.add(request)
        return request

    def decide(self) -> dict[str, int]:
        """The next decision, not yet computed: request id -> tokens."""
        ran_last = bool(self.output.requests)
        self.output = self.scheduler.schedule(self.now_s)
        self._check_sums(ran_last)
        for request_id in self.output.rejected:  # as the engine does
            self.abort(self.scheduler.requests[request_id])
        self.kv.check_integrity()
        return {request.request_id: count for request, count in
                zip(self.output.requests, self.output.num_scheduled_tokens, strict=True)}

    def _check_sums(self, ran_last: bool) -> None:
        """What the scheduler has added up while it packed is what its batch adds up to."""
        output, sums = self.output, StepFeatures(restored_tokens=self.output.features.restored_tokens)
        for request, count in zip(output.requests, output.num_scheduled_tokens, strict=True):
            sums.add(count, request.num_computed_tokens)
        assert output.features == sums
        assert self.scheduler.executing_s == pytest.approx(self.latency.executing_s(sums), abs=1e-12)
        if ran_last and output.requests:  # else the copies of a step that ran nobody may be among these
            assert sums.restored_tokens == len(output.kv_changes.copies.restore)
        assert output.num_behind == len(self.scheduler.requests) - len(output.requests) - len(output.left_out)
        assert not output.left_out.keys() & {request.request_id for request in output.requests}

    def compute(self) -> list[Request]:
        """Computes the last decision; returns who ended with it."""
        duration_s = self.truth.predict(self.output.features) if self.output.requests else 0.0
        self.now_s += duration_s
        tokens = [7 if request.num_computed_tokens + count == request.num_tokens else None for request, count in
                  zip(self.output.requests, self.output.num_scheduled_tokens, strict=True)]
        ended = self.scheduler.update_from_output(self.output, tokens, self.now_s, duration_s)
        self.kv.check_integrity()
        return ended

    def step(self) -> dict[str, int]:
        """One whole iteration: request id -> tokens computed."""
        decided = self.decide()
        self.compute()
        return decided

    def abort(self, request: Request) -> None:
        self.scheduler.finish(request, RequestStatus.ABORTED)
