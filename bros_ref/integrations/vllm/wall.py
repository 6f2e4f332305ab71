"""vLLM's schedulers and ours on the hybrid workload in wall-clock time, with real vLLM and SmolLM2:

    python -m bros_ref.integrations.vllm.wall --rounds 5 --file runs.jsonl

The workload is that of `bench.py` at half the width and with half the BE output, so that a run is short: 4 BE requests
of 512 + 64 tokens at t = 0 and 4 RT requests of 64 + 32 over 6.7 s, 4 sequences at most, 1,600 KV tokens. Each system
runs once in each round, in alternating order, in an engine of its own that has served two requests before. Each run is
appended to the file, and those that are in the file already are skipped, so an interrupted comparison can go on later.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: one clock
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import typer
from vllm import LLM, SamplingParams

from bros_ref.evaluation.bench.hybrid import HYBRID_SLO, hybrid_items
from bros_ref.integrations.vllm.bench import measure
from bros_ref.integrations.vllm.smollm2 import write_smollm2
from bros_ref.integrations.vllm.stepping import Served
from bros_ref.workload.generate import WorkloadItem

NUM_BE, BE_OUTPUT_TOKENS, NUM_RT, MAX_NUM_SEQS, BLOCK_SIZE, KV_TOKENS = 4, 64, 4, 4, 32, 1_600
BROS: dict[str, Any] = {
    "scheduler_cls": "bros_ref.integrations.vllm.BROSScheduler",
    "additional_config": {"bros": {"ttft_slo_s": HYBRID_SLO.ttft_s, "tpot_slo_s": HYBRID_SLO.tpot_s}}}
HOST_STORE: dict[str, Any] = {"kv_transfer_config": {
    "kv_connector": "HostKVConnector", "kv_connector_module_path": "bros_ref.integrations.vllm.connector",
    "kv_role": "kv_both", "kv_connector_extra_config": {"num_host_blocks": KV_TOKENS // BLOCK_SIZE}}}
SYSTEMS: dict[str, dict[str, Any]] = {
    "vllm-fcfs": {"scheduling_policy": "fcfs"}, "vllm-priority": {"scheduling_policy": "priority"},
    "bros": BROS, "bros-host": BROS | HOST_STORE}
WARM_UP = [replace(item, arrival_s=0.0, output_tokens=16) for item in hybrid_items(0, HYBRID_SLO, 1, 1)]


def serve(folder: str, system: str, budget: int, items: Sequence[WorkloadItem], seed: int) -> dict[str, Served]:
    """One run to the end; ids start with "rt" or "be". Times are in seconds since the start."""
    llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=1024, max_num_seqs=MAX_NUM_SEQS,
              block_size=BLOCK_SIZE, num_gpu_blocks_override=KV_TOKENS // BLOCK_SIZE + 1, enforce_eager=True,
              max_num_batched_tokens=budget, disable_log_stats=True, **SYSTEMS[system])
    try:
        _serve(llm.llm_engine, WARM_UP, np.random.default_rng(seed + 1))
        return _serve(llm.llm_engine, items, np.random.default_rng(seed))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _serve(engine: Any, items: Sequence[WorkloadItem], rng: np.random.Generator) -> dict[str, Served]:
    served: dict[str, Served] = {}
    started_s, waiting = time.time(), list(items)
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0].arrival_s <= time.time() - started_s:
            item = waiting.pop(0)
            name = f"{'be' if item.slo is None else 'rt'}-{len(served)}"
            served[name] = Served(item.arrival_s, item.prompt_tokens)
            prompt = rng.integers(1_000, 40_000, item.prompt_tokens).tolist()
            slo = {"ttft_slo_s": item.slo.ttft_s, "tpot_slo_s": item.slo.tpot_s} if item.slo else None
            engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(
                max_tokens=item.output_tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=slo),
                arrival_time=started_s + item.arrival_s, priority=int(item.slo is None))
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, started_s + waiting[0].arrival_s - time.time()))
            continue
        outputs, now_s = engine.step(), time.time() - started_s
        for output in outputs:
            request = served[output.request_id]
            token_ids = list(output.outputs[0].token_ids)
            request.token_s += [now_s] * (len(token_ids) - len(request.token_ids))
            request.token_ids = token_ids
    return served


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One line per system and budget: medians over the rounds, with the lowest and the highest, and RT on time."""
    lines = [f"{'system':14} {'tokens/step':>11} {'rounds':>6} {'RT TTFT p50':>21} {'RT TTFT max':>21} {'on time':>7} "
             f"{'BE tokens/s':>18}"]
    for system, budget in dict.fromkeys((run["system"], run["token_budget"]) for run in runs):
        rows = [run for run in runs if (run["system"], run["token_budget"]) == (system, budget)]
        cells = []
        for key, digits in (("ttft_p50_s", 2), ("ttft_max_s", 2), ("be_tokens_per_s", 1)):
            values = [row[key] for row in rows]
            cells.append(f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]")
        on_time = f"{sum(row['num_on_time'] for row in rows)}/{sum(row['num_rt'] for row in rows)}"
        lines.append(f"{system:14} {budget:11} {len(rows):6} {cells[0]:>21} {cells[1]:>21} {on_time:>7} {cells[2]:>18}")
    return "\n".join(lines)


def main(rounds: Annotated[int, typer.Option(min=1, help="Rounds, with RT arrivals of their own.")] = 5,
         budgets: Annotated[str, typer.Option(help="Token budgets per step, separated by commas.")] = "256,2048",
         systems: Annotated[str, typer.Option(help="Systems, separated by commas.")] = ",".join(SYSTEMS),
         file: Annotated[Path, typer.Option(help="One run per line, as JSON.")] = Path("vllm-wall.jsonl")) -> None:
    """vLLM's schedulers and BROS in vLLM on the hybrid workload, wall clock."""
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        write_smollm2(Path(folder))
        for number, budget in product(range(rounds), map(int, budgets.split(","))):
            items = [replace(item, output_tokens=item.output_tokens if item.slo else BE_OUTPUT_TOKENS)
                     for item in hybrid_items(number, HYBRID_SLO, NUM_BE, NUM_RT)]
            for system in systems.split(",")[::1 if number % 2 == 0 else -1]:
                key = {"system": system, "token_budget": budget, "round": number}
                if not any(key.items() <= run.items() for run in runs):
                    runs.append(key | measure(serve(folder, system, budget, items, number)))
                    with file.open("a") as lines:
                        lines.write(json.dumps(runs[-1]) + "\n")
    print(table(runs))


if __name__ == "__main__":
    typer.run(main)
