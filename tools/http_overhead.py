"""What the HTTP server costs: the same workload over HTTP and through the engine in one process, alternated.

    python tools/http_overhead.py --rounds 6                     # RT beside four best-effort requests, all streamed
    python tools/http_overhead.py --rounds 5 --lines 1000        # RT beside a batch of 1,000 lines
    python tools/http_overhead.py --rounds 0 --lines 1000        # prints what --file has of it

Each round has arrivals of its own. In both runs an RT request comes first, since BROS learns from it which TTFT target
is typical. Each run is appended to --file, so that an interrupted comparison can be printed or extended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from bros_ref.evaluation.bench.serve import bench_serve, default_workload, find_target
from bros_ref.request import SLO, RequestClass
from bros_ref.workload.files import save_workload
from bros_ref.workload.generate import WorkloadItem, merge, open_loop, poisson_arrivals, uniform_lengths

RT_SLO, RT_RATE, RT_LENGTHS = SLO(0.6, 0.4), 0.6, (64, 32)
NUM_BE, DURATION_S = 4, 20.0
LINE_LENGTHS, LINES_PER_S = (24, 8), 20.0  # prompt and output tokens of a line; about what two cores serve
ENGINE = ["--policy", "bros", "--kv-blocks", "200", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"]
SERVED = ("http", "process")


def workload(lines: int, seed: int) -> list[WorkloadItem]:
    """RT requests by Poisson arrivals beside NUM_BE long best-effort requests, or beside `lines` short ones."""
    rng = np.random.default_rng(seed)
    first = open_loop([0.0], RequestClass.REAL_TIME, uniform_lengths(64, 64), uniform_lengths(4, 4), rng, RT_SLO)
    if not lines:
        rest = [replace(item, arrival_s=item.arrival_s + 1.0)
                for item in default_workload(RT_RATE, NUM_BE, DURATION_S, RT_SLO, seed)]
        return merge(first, rest)
    arrivals = [1.0 + arrival_s for arrival_s in poisson_arrivals(RT_RATE, lines / LINES_PER_S, rng)]
    (rt_in, rt_out), (be_in, be_out) = RT_LENGTHS, LINE_LENGTHS
    return merge(
        first,
        open_loop(arrivals, RequestClass.REAL_TIME, uniform_lengths(rt_in, rt_in), uniform_lengths(rt_out, rt_out), rng,
                  RT_SLO),
        open_loop([0.0] * lines, RequestClass.BEST_EFFORT, uniform_lengths(be_in, be_in),
                  uniform_lengths(be_out, be_out), rng))


@contextmanager
def server(folder: str, engine: Sequence[str]) -> Iterator[str]:
    """The address of a server of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bros_ref", "serve", "--port", "0", "--data-dir", folder,
         "--ttft-slo-s", str(RT_SLO.ttft_s), "--tpot-slo-s", str(RT_SLO.tpot_s), *engine],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield next(line.split()[-1] for line in process.stdout or () if line.startswith("listening on"))
    finally:
        process.terminate()
        process.wait()


def over_http(items: Sequence[WorkloadItem], seed: int, engine: Sequence[str], as_batch: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, server(folder, engine) as url:
        run, _ = bench_serve(find_target(url, "none", None, ignore_eos=True), items, seed, be_as_batch=as_batch)
        return run


def in_process(items: Sequence[WorkloadItem], engine: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_workload(items, path := Path(folder) / "workload.jsonl")
        printed = subprocess.run(
            [sys.executable, "-m", "bros_ref", "serve-trace", "--workload", path, "--json", "-", "--trace",
             Path(folder) / "trace.json", *engine],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    run: dict[str, Any] = json.loads(printed)["runs"][0]
    return run


def figures(run: dict[str, Any]) -> dict[str, float | None]:
    real_time, best_effort = run["classes"]["rt"], run["classes"]["be"]
    return {"RT TTFT, median (ms)": real_time["median_ttft_ms"], "RT TPOT, median (ms)": real_time["median_tpot_ms"],
            "RT on time": real_time["slo_attainment"], "BE tokens/s": best_effort["output_throughput"],
            "HTTP adds to TTFT (ms)": run.get("http_added_ttft_ms")}


def table(rounds: Sequence[dict[str, dict[str, float]]]) -> str:
    """Medians over the rounds, and of the ratios of each round's two runs, with the lowest and the highest."""
    def shown(values: Sequence[float], digits: int) -> str:
        return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

    lines = [f"{'':24} {'HTTP':>26} {'in process':>26} {'HTTP / in process':>20}"]
    for name in rounds[0]["process"]:
        http, process = ([one[served][name] for one in rounds] for served in SERVED)
        if None in process:
            lines.append(f"{name:24} {shown(http, 1):>26}")
            continue
        ratios = [ours / theirs for ours, theirs in zip(http, process, strict=True)]
        lines.append(f"{name:24} {shown(http, 2):>26} {shown(process, 2):>26} {shown(ratios, 3):>20}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--lines", type=int, default=0, help="lines of a batch; 0: four long requests instead")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the client needs a core too")
    parser.add_argument("--file", type=Path, default=Path("http-overhead.jsonl"))
    parser.add_argument("--model", default="smollm2")
    asked = parser.parse_args()
    kept = [json.loads(line) for line in asked.file.read_text().splitlines()] if asked.file.exists() else []
    console = Console(stderr=True)
    key = {"model": asked.model, "lines": asked.lines, "threads": asked.threads}
    engine = [*ENGINE, "--model", asked.model, "--threads", str(asked.threads)]
    for seed in range(asked.rounds):
        if any(key | {"seed": seed} == one["key"] for one in kept):
            continue
        items, runs = workload(asked.lines, seed), {}
        for served in SERVED[::1 if seed % 2 == 0 else -1]:
            console.print(f"round {seed + 1} of {asked.rounds}: {served}")
            runs[served] = figures(over_http(items, seed, engine, as_batch=asked.lines > 0)
                                   if served == "http" else in_process(items, engine))
        kept.append({"key": key | {"seed": seed}, "runs": runs})
        with asked.file.open("a") as lines:
            lines.write(json.dumps(kept[-1]) + "\n")
    rounds = [one["runs"] for one in kept if key.items() <= one["key"].items()]
    if not rounds:
        raise SystemExit(f"{asked.file} has no round of this comparison; ask for --rounds 1 or more")
    print(table(rounds))


if __name__ == "__main__":
    main()
