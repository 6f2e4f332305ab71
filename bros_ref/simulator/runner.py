"""Takes the place of `ModelRunner` and computes nothing: it advances the clock by the time that a GPU would take.

The scheduler, the KV accounting and the engine around it are the very same objects as in a live run; only `execute`
and the clock differ. Every sampled token is 0, so requests must run to their length (`ignore_eos`).
"""

from __future__ import annotations

from typing import Protocol

from bros_ref.clock import VirtualClock
from bros_ref.scheduler.latency_model import StepFeatures, StepLatencyModel
from bros_ref.scheduler.output import SchedulerOutput
from bros_ref.simulator.cost_model import CostModel

# Batches for the offline fit: single prefills as (new, context), decodes as (sequences, context), and both at once.
FIT_PREFILLS = ((32, 0), (128, 0), (256, 0), (512, 0), (1024, 0), (2048, 0), (256, 1024), (512, 512))
FIT_DECODES = tuple((count, context) for count in (1, 8, 32, 64, 128) for context in (128, 512, 1024))


class Cost(Protocol):
    """What a simulated step takes; `CostModel` documents the arguments."""

    def step_s(self, new_tokens: int, num_decodes: int, prefill_products: float, decode_contexts: int) -> float: ...

    def copy_s(self, to_host_tokens: int, to_device_tokens: int, within_tokens: int) -> float: ...


class SimulatedRunner:
    """Executes a decision in virtual time: T = max(compute, copies), since copies overlap compute (paper).

    Attributes:
        cost: the GPU and model.
        clock: advanced by every step.
    """

    def __init__(self, cost: Cost, clock: VirtualClock) -> None:
        self.cost = cost
        self.clock = clock

    def execute(self, output: SchedulerOutput) -> list[int | None]:
        """[num_requests]: token 0, or None where the prompt is not done yet."""
        features, counts, copies = output.features, output.num_scheduled_tokens, output.kv_changes.copies
        duration_s = self.cost.step_s(features.new_tokens, counts.count(1), features.prefill_products,
                                      features.decode_contexts)
        if copies:
            duration_s = max(duration_s, self.cost.copy_s(len(copies.checkpoint), len(copies.restore),
                                                          len(copies.relocate)))
        self.clock.advance(duration_s)
        return [0 if request.num_computed_tokens + count == request.num_tokens else None
                for request, count in zip(output.requests, counts, strict=True)]


def fit_to(cost: CostModel) -> StepLatencyModel:
    """The scheduler's linear model, fitted offline to what this GPU takes, as it would be to a real one."""
    samples: list[tuple[StepFeatures, float]] = []
    for new, context in FIT_PREFILLS:
        _sample(samples, cost, [(new, context)])
    for count, context in FIT_DECODES:
        _sample(samples, cost, [(1, context)] * count)
        _sample(samples, cost, [(256, 0)] + [(1, context)] * count)
    return StepLatencyModel.fit(samples, cost.restore_s_per_token)


def _sample(samples: list[tuple[StepFeatures, float]], cost: CostModel, batch: list[tuple[int, int]]) -> None:
    features = StepFeatures()
    for new, context in batch:
        features.add(new, context)
    num_decodes = sum(new == 1 for new, _ in batch)
    samples.append((features, cost.step_s(features.new_tokens, num_decodes, features.prefill_products,
                                          features.decode_contexts)))
