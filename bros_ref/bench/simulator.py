"""What simulating costs: CPU seconds and request-steps per second, on the paper's OPT-13B setting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bros_ref.paper import PaperWorkload, be_batch_for
from bros_ref.simulate import SimulationSettings, run


def bench_simulator(policies: Sequence[str], duration_s: float, rt_rate: float, seed: int,
                    on_row: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    """One row a policy. A request-step is one request scheduled in one step."""
    settings = SimulationSettings(seed=seed)
    arrivals = PaperWorkload(rt_rate, duration_s, be_batch_for(settings.num_blocks * settings.block_size))
    rows = []
    for policy in policies:
        start_s = time.process_time()
        summary, _ = run(policy, settings, arrivals)
        cpu_s = time.process_time() - start_s
        request_steps = summary["scheduler"]["request_steps"]
        rows.append({"policy": policy, "model": settings.model, "gpu": f"{settings.tp} x {settings.gpu}",
                     "simulated_s": summary["duration_s"], "cpu_s": cpu_s, "request_steps": request_steps,
                     "request_steps_per_s": request_steps / cpu_s})
        if on_row is not None:
            on_row()
    return rows
