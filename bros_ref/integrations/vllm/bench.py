"""vLLM's schedulers and ours on the same hybrid workload and modelled clock:

    python -m bros_ref.integrations.vllm.bench

The workload is that of `bros-ref bench hybrid`: 16 BE requests of 512 + 128 tokens at t = 0, 12 RT requests of 64 + 32
over 20 s, 8 sequences at most, 3,200 KV tokens. Every decision is made by vLLM's own scheduler class, or by ours in
vLLM. No model runs: a step takes 32 ms + 2.5 ms per token, and copies take no time. `bros-host` keeps the KV of
preempted BE in host memory; `rt-only` is the latency floor, `be-only` the throughput ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from vllm.v1.core.sched.scheduler import Scheduler

from bros_ref.evaluation.bench.hybrid import HYBRID_SLO, MODELLED_STEP, hybrid_items
from bros_ref.integrations.vllm.scheduler import BROSScheduler
from bros_ref.integrations.vllm.stepping import VOCAB_SIZE, Pool, Served, Stepper

SYSTEMS: dict[str, tuple[type[Any], str, int]] = {  # scheduler class, vLLM's policy, and host blocks
    "vllm-fcfs": (Scheduler, "fcfs", 0), "vllm-priority": (Scheduler, "priority", 0),
    "bros": (BROSScheduler, "fcfs", 0), "bros-host": (BROSScheduler, "fcfs", 200)}
REFERENCES = {"rt-only": ("bros", True), "be-only": ("vllm-fcfs", False)}  # the system; whether it gets RT, or BE


def serve_hybrid(system: str, seed: int, pool: Pool) -> Stepper:
    """One run to the end; in `served`, ids start with "rt" or "be"."""
    scheduler_cls, policy, num_host_blocks = SYSTEMS[REFERENCES[system][0] if system in REFERENCES else system]
    settings = {"latency": (*MODELLED_STEP, 0.0, 0.0), "ttft_slo_s": HYBRID_SLO.ttft_s,
                "tpot_slo_s": HYBRID_SLO.tpot_s} if scheduler_cls is BROSScheduler else None
    stepper = Stepper(scheduler_cls, replace(pool, num_host_blocks=num_host_blocks), policy, settings, *MODELLED_STEP)
    rng = np.random.default_rng(seed)
    arrivals = [item for item in hybrid_items(seed, HYBRID_SLO)
                if system not in REFERENCES or (item.slo is not None) == REFERENCES[system][1]]
    num_added = 0
    while num_added < len(arrivals) or stepper.scheduler.has_requests():
        if not stepper.scheduler.has_requests():
            stepper.now_s = max(stepper.now_s, arrivals[num_added].arrival_s)
        while num_added < len(arrivals) and arrivals[num_added].arrival_s <= stepper.now_s:
            item = arrivals[num_added]
            slo: dict[str, Any] = {}
            if item.slo is not None:
                slo = {"ttft_slo_s": item.slo.ttft_s, "tpot_slo_s": item.slo.tpot_s}
            request_id = f"{'be' if item.slo is None else 'rt'}-{num_added}"
            stepper.add(request_id, rng.integers(1, VOCAB_SIZE, item.prompt_tokens).tolist(), item.output_tokens,
                        priority=int(item.slo is None), arrival_s=item.arrival_s, **slo)
            num_added += 1
        stepper.step()
    return stepper


def measure(served: dict[str, Served]) -> dict[str, float | None]:
    """TTFT percentiles and number on time of RT, and output tokens per second of BE until the last BE request ends."""
    rt = [request for name, request in served.items() if name.startswith("rt")]
    be = [request for name, request in served.items() if name.startswith("be")]
    ttft_s = [request.token_s[0] - request.arrival_s for request in rt]
    on_time = [ttft <= HYBRID_SLO.ttft_s and _tpot_s(request) <= HYBRID_SLO.tpot_s
               for ttft, request in zip(ttft_s, rt, strict=True)]
    return {"ttft_p50_s": float(np.quantile(ttft_s, 0.5)) if rt else None,
            "ttft_p99_s": float(np.quantile(ttft_s, 0.99)) if rt else None, "ttft_max_s": max(ttft_s, default=None),
            "num_on_time": sum(on_time) if rt else None, "num_rt": len(rt),
            "be_tokens_per_s": sum(len(request.token_ids) for request in be) / max(
                request.token_s[-1] for request in be) if be else None}


def _tpot_s(request: Served) -> float:
    return (request.token_s[-1] - request.token_s[0]) / (len(request.token_s) - 1)


def run(systems: Sequence[str], budgets: Sequence[int], seeds: Sequence[int],
        prefix_caching: bool) -> list[dict[str, Any]]:
    """One row per system and budget: medians over the seeds, and the total number of RT on time. Tokens that were
    computed more than once count as recomputed."""
    rows = []
    for budget in budgets:
        for system in systems:
            pool = Pool(max_num_batched_tokens=budget, prefix_caching=prefix_caching)
            steppers = [serve_hybrid(system, seed, pool) for seed in seeds]
            runs = [measure(stepper.served) for stepper in steppers]
            row: dict[str, Any] = {"system": system, "token_budget": budget, "prefix_caching": prefix_caching}
            for key in ("ttft_p50_s", "ttft_p99_s", "be_tokens_per_s"):
                row[key] = None if runs[0][key] is None else median(float(result[key] or 0) for result in runs)
            row["num_on_time"] = sum(int(result["num_on_time"] or 0) for result in runs)
            row["recomputed_tokens"] = median(stepper.num_recomputed_tokens for stepper in steppers)
            row["num_rt"] = sum(int(result["num_rt"] or 0) for result in runs)
            rows.append(row)
    return rows


def main(seeds: Annotated[int, typer.Option(min=1, help="Runs per row, with RT arrivals of their own.")] = 7,
         budgets: Annotated[str, typer.Option(help="Token budgets per step, separated by commas.")] = "256,2048",
         prefix_caching: Annotated[bool, typer.Option(help="Whether vLLM's prefix cache is on.")] = True,
         json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows there.")] = None) -> None:
    """vLLM's schedulers and BROS in vLLM on the hybrid workload, modelled clock."""
    rows = run([*REFERENCES, *SYSTEMS], [int(budget) for budget in budgets.split(",")], range(seeds), prefix_caching)
    print(f"{'system':14} {'tokens/step':>11} {'TTFT p50':>9} {'TTFT p99':>9} {'on time':>9} {'BE tokens/s':>11} "
          f"{'recomputed':>10}")
    for row in rows:
        ttft = [f"{row[key]:8.2f}s" if row[key] is not None else f"{'-':>9}" for key in ("ttft_p50_s", "ttft_p99_s")]
        on_time = f"{row['num_on_time']}/{row['num_rt']}" if row["num_rt"] else "-"
        be = f"{row['be_tokens_per_s']:.1f}" if row["be_tokens_per_s"] is not None else "-"
        print(f"{row['system']:14} {row['token_budget']:11} {' '.join(ttft)} {on_time:>9} {be:>11} "
              f"{row['recomputed_tokens']:10}")
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
