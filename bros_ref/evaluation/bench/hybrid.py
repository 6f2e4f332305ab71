"""The live hybrid run under KV pressure: every policy serves the same workload on the same model and pool.

The workload is the one on which vLLM's CPU backend was measured for comparison: 16 BE requests of 512 + 128 tokens at
t = 0 and 12 RT requests of 64 + 32 over 20 s, 8 sequences at most, 3,200 KV tokens, no prefix cache. The token budget
of a step is 128 for every policy; those that compute whole prompts exceed it by one prompt. `rt-only` is the latency
floor, `be-only` the throughput ceiling, each in whichever form of BROS serves its class better.

The model computes every token in either mode; the clocks differ:

    modelled   a step takes 32 ms + 2.5 ms per token, whatever the machine: the same figures everywhere, so that
               differences between policies are theirs. Deciding takes no time
    wall       real time, of a machine that may be busy with other things. Rounds are half as long, and every policy
               runs once in each, in alternating order, so that a slow minute hits all of them

Each round has a seed of its own for the RT arrivals, and the policies of a round share it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from bros_ref.clock import VirtualClock, WallClock
from bros_ref.engine.build import LiveSettings, LoadedModel, make_engine, make_runner, request_from_item
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.engine.profile import fit_latency_model
from bros_ref.engine.serve import keep_class, serve
from bros_ref.request import SLO, RequestClass
from bros_ref.scheduler import REFERENCE_FORMS, REFERENCE_POLICIES
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.scheduler.output import SchedulerOutput
from bros_ref.simulator.simulate import reference_rank
from bros_ref.trace.metrics import summarise
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import Workload, WorkloadItem, merge

DEFAULT_POLICIES = ("rt-only", "be-only", "vllm-fcfs", "vllm-priority", "sglang-priority", "bros-rr", "bros",
                    "bros-plus")
SETTINGS = LiveSettings(kv_blocks=200, max_num_seqs=8, max_num_batched_tokens=128, chunked_prefill=True)
HYBRID_SLO = SLO(0.6, 0.4)
MODELLED_STEP = (0.032, 0.0025)  # seconds per step, and per token
RT_PER_S = 0.6
NUM_BE, NUM_RT = {"modelled": 16, "wall": 8}, {"modelled": 12, "wall": 6}
TIE_S = 1e-6  # between two BE arrivals: a tie would be broken differently by each system

ClockName = Literal["wall", "modelled"]
CLOCKS: tuple[ClockName, ...] = ("wall", "modelled")


def parse_clock(name: str) -> ClockName:
    """A clock by its name. Raises ValueError for an unknown one."""
    for known in CLOCKS:
        if name == known:
            return known
    raise ValueError(f"--clock must be {' or '.join(CLOCKS)}, got {name!r}")


def parse_step(text: str) -> tuple[float, float]:
    """"A,B": seconds per step and per token of the modelled clock.

    Raises:
        ValueError: not two finite numbers, a negative one, or both zero: time would stand still.
    """
    try:
        step_s, token_s = (float(part) for part in text.split(","))
        if not (0 <= step_s < math.inf and 0 <= token_s < math.inf and step_s + token_s > 0):
            raise ValueError
    except ValueError:
        raise ValueError(f"--modelled-step needs two numbers of seconds, at least 0 and not both 0, as in "
                         f"0.032,0.0025; got {text!r}") from None
    return step_s, token_s


class ModelledRunner:
    """Computes each step with the model, then lets the modelled time pass instead of the real one.

    Attributes:
        runner: what computes.
        truth: the modelled step time; copies between device and host cost nothing.
    """

    def __init__(self, runner: ModelRunner, clock: VirtualClock, truth: StepLatencyModel) -> None:
        self.runner, self.clock, self.truth = runner, clock, truth

    def execute(self, output: SchedulerOutput) -> list[int | None]:
        """[num_requests]: the sampled token, or None where the prompt is not done yet."""
        token_ids = self.runner.execute(output)
        self.clock.advance(self.truth.predict(output.features))
        return token_ids


def hybrid_items(seed: int, slo: SLO, num_be: int = NUM_BE["modelled"], num_rt: int = NUM_RT["modelled"],
                 ) -> list[WorkloadItem]:
    """The workload of the module's docstring; fewer RT come over a shorter time."""
    rng = np.random.default_rng(seed)
    be = [WorkloadItem(index * TIE_S, RequestClass.BEST_EFFORT, 512, 128) for index in range(num_be)]
    times = np.sort(rng.uniform(0, num_rt / RT_PER_S, num_rt))  # Poisson arrivals, given that there are `num_rt`
    rt = [WorkloadItem(float(time_s), RequestClass.REAL_TIME, 64, 32, slo) for time_s in times]
    return merge(be, rt)


def bench_hybrid(loaded: LoadedModel, policies: Sequence[str] = DEFAULT_POLICIES, slo: SLO = HYBRID_SLO,
                 rounds: int = 5, seed: int = 0, clock: ClockName = "modelled",
                 modelled_step: tuple[float, float] = MODELLED_STEP, settings: LiveSettings = SETTINGS,
                 num_be: int | None = None, num_rt: int | None = None, refit: bool = False,
                 on_run: Callable[[str, int], None] | None = None) -> tuple[list[dict[str, Any]], list[Trace]]:
    """Serves the workload once for each policy and round; round i has seed `seed + i`.

    Returns:
        All runs as `metrics.summarise` gives them, policy by policy, and the traces of the first round.
    """
    num_be, num_rt = num_be or NUM_BE[clock], num_rt or NUM_RT[clock]
    runner = make_runner(loaded, settings)
    modelled = StepLatencyModel((*modelled_step, 0.0, 0.0))
    latency = modelled if clock == "modelled" else fit_latency_model(
        runner, settings.max_num_seqs, loaded.name, refit=refit)
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    traces: dict[str, Trace] = {}
    for round_ in range(rounds):
        items = hybrid_items(seed + round_, slo, num_be, num_rt)
        for policy in policies if round_ % 2 == 0 else reversed(policies):
            if on_run is not None:
                on_run(policy, round_)
            forms = REFERENCE_FORMS if policy in REFERENCE_POLICIES else (policy,)
            results = []
            for form in forms:
                trace = _serve_round(form, keep_class(items, policy), loaded, runner,
                                     replace(settings, seed=seed + round_), copy.deepcopy(latency),
                                     modelled if clock == "modelled" else None)
                trace.policy = policy
                results.append((summarise(trace), trace))
            summary, trace = min(results, key=lambda result: reference_rank(result[0]))
            runs[policy].append(summary)
            traces.setdefault(policy, trace)
    return [run for policy in policies for run in runs[policy]], [traces[policy] for policy in policies]


def _serve_round(policy: str, items: list[WorkloadItem], loaded: LoadedModel, runner: ModelRunner,
                 settings: LiveSettings, latency: StepLatencyModel, modelled: StepLatencyModel | None) -> Trace:
    clock = VirtualClock() if modelled else WallClock()
    engine = make_engine(policy, loaded, runner, settings, latency, clock)
    assert engine.trace is not None
    if modelled is not None and isinstance(clock, VirtualClock):
        engine.runner = ModelledRunner(runner, clock, modelled)
        engine.trace.device += ", modelled clock"
    serve(engine, Workload(items), lambda item: request_from_item(item, loaded, settings.seed))
    return engine.trace
