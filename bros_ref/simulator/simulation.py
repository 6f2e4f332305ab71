"""The public API of simulated runs: a model on named GPUs serves a workload under a policy.

    Simulation("opt-13b", gpu="a100-40gb", tp=2).run("bros-plus", PaperWorkload(4.0, 120.0, be_batch=66)).metrics

Scheduler, KV accounting and engine are the live ones; only the time of a step is modelled (`cost_model.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bros_ref.request import SLO
from bros_ref.simulator.simulate import SimulationSettings, run
from bros_ref.trace.trace import Trace
from bros_ref.workload.files import read_workload
from bros_ref.workload.generate import WorkloadItem
from bros_ref.workload.paper import PaperWorkload

if TYPE_CHECKING:
    import plotly.graph_objects as go

DEFAULT_SLO = SLO(1.0, 0.25)  # of real-time requests in a file that brings none


@dataclass(frozen=True)
class SimulationResult:
    """One simulated run.

    Attributes:
        metrics: as `LLM.metrics()`; "classes", "kv", "scheduler", "prediction".
        basis: where the step times come from; part of every title, because no GPU produced them.
        trace: every step with its reasons.
    """

    policy: str
    metrics: dict[str, Any]
    basis: str
    trace: Trace

    def plot(self) -> go.Figure:
        """A plot of who ran, waited and was preempted over time; up to 40 requests."""
        from bros_ref.viz.figures.timeline import schedule

        title = {"text": f"{self.policy}, simulated: {self.basis}", "font": {"size": 14}}
        return schedule(self.trace).update_layout(title=title, margin_t=104)


class Simulation:
    """A model on simulated GPUs.

    Args:
        model, gpu: names that `bros-ref simulate` knows.
        tp: GPUs that share the model.
        limits: fields of `SimulationSettings`, such as `kv_tokens`, `block_size`, `max_num_seqs`.

    Raises:
        ValueError: an unknown model or GPU, or a model that does not fit; TypeError: an unknown field.
    """

    def __init__(self, model: str = "opt-13b", gpu: str = "a100-40gb", tp: int = 2, **limits: Any) -> None:
        self.settings = SimulationSettings(gpu=gpu, model=model, tp=tp, **limits)
        self.num_blocks = self.settings.num_blocks  # refuses now what could not run later

    def __repr__(self) -> str:
        at = self.settings
        return (f"Simulation({at.model!r} on {at.tp} x {at.gpu}, {self.num_blocks:,} KV blocks of {at.block_size} "
                f"tokens; {at.basis})")

    def run(self, policy: str, workload: PaperWorkload | Iterable[WorkloadItem] | str | Path, *,
            seed: int | None = None, until_s: float = float("inf")) -> SimulationResult:
        """Serves a workload in virtual time. The same seed gives the same run.

        Args:
            workload: a recipe, items, or a workload file.
            seed: of a recipe's draws; None: that of the settings.
            until_s: virtual time at which to stop.

        Raises:
            ValueError: an unknown policy, or a workload that cannot be read.
        """
        settings = self.settings if seed is None else replace(self.settings, seed=seed)
        if isinstance(workload, str | Path):
            workload = read_workload(Path(workload), slo=DEFAULT_SLO)
        arrivals = workload if isinstance(workload, PaperWorkload) else tuple(workload)
        metrics, trace = run(policy, settings, arrivals, until_s, keep_steps=True)
        return SimulationResult(policy, metrics, settings.basis, trace)
