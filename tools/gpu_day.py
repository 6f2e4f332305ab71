"""One command for a machine with a GPU: kernels verified, tested, timed, profiled; the engine run; JSON and Markdown.

    PYTHONPATH=. python tools/gpu_day.py --out out/gpu           # from a checkout; installs nothing, needs no network
    PYTHONPATH=. python tools/gpu_day.py --out out/gpu --docs    # and show the results in docs/gpu.md
    PYTHONPATH=. python tools/gpu_day.py --dry                   # without a GPU: on the emulator, and nothing is timed
    PYTHONPATH=. python tools/gpu_day.py --estimates             # without a GPU: write docs/gpu.md's estimates anew

Stages run in order of importance, each in its own process with a time limit, so one that fails or hangs does not affect
the others. A stage that the machine cannot run, or that no longer fits the time, is named with the reason. Kernels are
timed only after their answers agreed with float64 on the same device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, KEPT = ROOT / "docs" / "gpu.md", ROOT / "docs" / "gpu.json"
ME = (sys.executable, __file__)
LEAST_S = 15.0  # a stage is not begun with less time left
BUDGET_S = 460.0
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A part of the day.

    Attributes:
        limit_s: after which it is ended.
        command: {out} is the folder of results.
        needs: a program or an importable module that must be there.
        dry: whether a dry run has it too.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]
    needs: str = "torch"
    dry: bool = False


def _hybrid(name: str, model: str) -> Stage:
    return Stage(name, 80, (sys.executable, "-m", "bros_ref", "bench", "hybrid", "--device", "cuda", "--model", model,
                            "--policies", "rt-only,vllm-priority,bros-plus", "--json", "{out}/" + name + ".json"))


SMALL = (*ME, "--out", "{out}", "--stage", "small")
STAGES = (
    Stage("verify", 120, (*ME, "--out", "{out}", "--stage", "verify"), dry=True),
    Stage("tests", 90, (sys.executable, "-m", "pytest", "tests/kernels/test_gpu.py", "-q", "-p", "no:cacheprovider",
                        "--confcutdir=tests/kernels"), "pytest", dry=True),
    Stage("decode", 100, (*ME, "--out", "{out}", "--stage", "decode"), dry=True),
    Stage("prefill_and_copies", 40, (*ME, "--out", "{out}", "--stage", "prefill_and_copies"), dry=True),
    Stage("engine_steps", 60, (*ME, "--out", "{out}", "--stage", "engine_steps"), dry=True),
    _hybrid("hybrid_smollm2", "smollm2"),
    _hybrid("hybrid_random", "random:llama"),
    Stage("ncu", 60, ("ncu", "--set", "basic", "--section", "MemoryWorkloadAnalysis", "--csv", "--log-file",
                      "{out}/ncu.csv", *SMALL), "ncu"),
    Stage("memcheck", 60, ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *SMALL),
          "compute-sanitizer"),
    Stage("racecheck", 60, ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *SMALL),
          "compute-sanitizer"),
    Stage("notebooks", 120, (*ME, "--out", "{out}", "--stage", "notebooks"), "nbclient"),
)

# ----- the stages that are functions of this file


def _device(dry: bool) -> tuple[Any, str]:
    """The device that runs kernels, and the torch device of the tensors."""
    if dry:
        from kernels_cupy.proof.emulator import Emulator

        return Emulator(), "cpu"
    from kernels_cupy.gpu import CupyDevice

    return CupyDevice(), "cuda"


def verify(dry: bool) -> dict[str, Any]:
    """Every kernel against float64 on the device: shapes that cover dtype, head size, group and block size in pairs."""
    import numpy as np
    import torch

    from kernels_cupy.heads import FP8, Heads
    from kernels_cupy.launch import STEPS, Problem, why_not
    from kernels_cupy.proof.contract import TOLERANCE, Batch, decode, prefill

    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    shapes = [(8, 2, 64, 16, half), (8, 2, 128, 16, half), (8, 2, 128, 16, bfloat), (16, 2, 128, 256, half),
              (2, 2, 80, 32, bfloat), (24, 2, 96, 16, half), (4, 2, 256, 16, bfloat), (24, 2, 256, 32, half),
              (6, 2, 64, 16, single), (24, 2, 128, 256, single), (14, 2, 64, 256, bfloat), (10, 2, 80, 16, half)]
    fp8 = [(8, 2, 64, 16, half, FP8), (8, 2, 128, 16, bfloat, FP8), (24, 2, 96, 32, half, FP8),
           (4, 2, 256, 16, half, FP8), (6, 2, 80, 16, single, FP8), (12, 1, 128, 256, half, FP8)]
    device, place = _device(dry)
    rng, rows = np.random.default_rng(0), []
    for shape in [shapes[0], fp8[0]] if dry else shapes + fp8:
        heads = Heads(*shape)
        size = heads.block_size
        lengths = [1, size - 1, size, size + 1, 3 * size + 2, *rng.integers(1, 60 if dry else 900, 4).tolist()]
        batch = Batch.draw(rng, heads, [1] * len(lengths), lengths).to(place)
        problem = Problem(heads, len(lengths), batch.tables.shape[1])
        for step in STEPS:
            if why_not(step, problem, device.gpu) is None:
                error = batch.error(decode(device, batch, step, num_sms=2 if dry else device.gpu.num_sms))
                rows.append({"kernel": f"step {step}", "shape": str(shape), "dtype": str(heads.dtype), "error": error})
        queries = [int(rng.integers(1, length + 1)) for length in lengths]
        batch = Batch.draw(rng, heads, queries, lengths).to(place)
        for fast in (False, True):
            error = batch.error(prefill(device, batch, fast))
            rows.append({"kernel": f"prefill {int(fast)}", "shape": str(shape), "dtype": str(heads.dtype),
                         "error": error})
    allowed = {str(dtype): error for dtype, error in TOLERANCE.items()}
    num_fused, wrong = _verify_fused(device, place, (half,) if dry else (half, bfloat, single))
    wrong += [row for row in rows if not row["error"] <= allowed[row["dtype"]]]
    return {"checked": len(rows) + num_fused, "wrong": wrong,
            "worst_error": {dtype: max(row["error"] for row in rows if row["dtype"] == dtype)
                            for dtype in sorted({row["dtype"] for row in rows})}}


def _verify_fused(device: Any, place: str, dtypes: Sequence[Any]) -> tuple[int, Rows]:
    """Checks the fused kernels; returns the number of runs, and the wrong ones."""
    import numpy as np

    from kernels_cupy.heads import FP8, Heads
    from kernels_cupy.proof.fused import check_add_norm, check_rope_store, check_silu_mul

    rng, num_runs, wrong = np.random.default_rng(0), 0, []
    for dtype in dtypes:
        for check, sizes in ((check_rope_store, (Heads(8, 2, 64, 16, dtype), 33, 64, False)),
                             (check_rope_store, (Heads(4, 2, 128, 16, dtype), 9, 64, True)),
                             (check_rope_store, (Heads(4, 2, 128, 16, dtype, FP8), 9, 128, False)),
                             (check_add_norm, (5, 4096, dtype)), (check_silu_mul, (5, 11008, dtype))):
            num_runs += 1
            try:
                check(device, rng, *sizes, place=place)
            except AssertionError as error:
                wrong.append({"kernel": check.__name__, "dtype": str(dtype), "error": str(error)})
    return num_runs, wrong


def _timer(dry: bool) -> Callable[[Callable[[], None]], list[float]]:
    """Replays of a CUDA graph; in a dry run the call is made once, and its time is no number."""
    from bros_ref.evaluation.bench.kernels import GraphTimer

    def untimed(call: Callable[[], None]) -> list[float]:
        call()
        return [float("nan")]

    return untimed if dry else GraphTimer()


def decode(dry: bool) -> dict[str, Any]:
    """The decode steps, torch's SDPA and other projects' kernels where they are installed."""
    import torch

    from bros_ref.evaluation.bench.kernels import CASES, Case, bench_kernels, copy_bandwidth
    from kernels_cupy.heads import FP8, Heads
    from kernels_cupy.launch import STEPS, Problem, why_not

    (device, place), timer = _device(dry), _timer(dry)
    bandwidth = float("nan") if dry else copy_bandwidth(timer, place)
    cases = (Case("one of 40", (40,)),) if dry else CASES
    rows: Rows = []
    half, bfloat = torch.float16, torch.bfloat16
    sizes = ((half, 128, half), (half, 128, FP8), (bfloat, 128, bfloat), (bfloat, 128, FP8), (half, 64, half))
    for dtype, head_dim, cache in sizes[:2 if dry else None]:
        heads = Heads(8, 2, 64, 16, dtype, cache) if dry else Heads(32, 8, head_dim, 16, dtype, cache)
        longest = max(max(case.context_lens) for case in cases) // heads.block_size + 1
        steps = [step for step in STEPS if why_not(step, Problem(heads, 1, longest), device.gpu) is None]
        found = bench_kernels(device, timer, heads, 0, place, bandwidth, cases, steps[-3:] if dry else steps)
        rows += [{"dtype": str(dtype), "cache": str(cache), "head_dim": heads.head_dim, **row} for row in found]
    return {"copy_bytes_per_s": bandwidth, "rows": rows}


def prefill_and_copies(dry: bool) -> dict[str, Any]:
    """The tensor-core prefill in TFLOP/s, and `copy_slots` in GB/s."""
    import torch

    from bros_ref.evaluation.bench.kernels import PREFILL_CASES, PrefillCase, bench_copies, bench_prefill
    from kernels_cupy.heads import FP8, Heads

    (device, place), timer = _device(dry), _timer(dry)
    sizes = (8, 2, 64, 16, torch.float16) if dry else (32, 8, 128, 16, torch.float16)
    cases = (PrefillCase("1 prompt of 20", 1, 20, 20),) if dry else PREFILL_CASES
    copies = bench_copies(device, timer, Heads(*sizes), place, *((2, 4) if dry else ()))
    rows = [{"cache": str(cache), **row} for cache in (torch.float16, FP8)
            for row in bench_prefill(device, timer, Heads(*sizes, cache), 0, place, cases)]
    return {"prefill": rows, "copies": copies}


def engine_steps(dry: bool) -> dict[str, Any]:
    """Whole decode steps of the engine with random weights in the shape of Llama-3-8B, or of as many layers as fit, for
    comparison with the estimates in docs/gpu.md."""
    import dataclasses

    import torch

    from bros_ref.evaluation.bench.gpu_step import llama_config, timed_steps
    from bros_ref.model.weights.load import load_model_config
    from bros_ref.model.weights.parameters import parameter_shapes

    device, place = _device(dry)
    if dry:
        config, dtype = dataclasses.replace(load_model_config("random:llama"), num_layers=1), torch.float32
    else:
        config, dtype = llama_config("llama-3-8b", 1024), torch.bfloat16 if device.gpu.arch >= 80 else torch.float16
        per_layer, beside = 0.6e9, 9e9  # bytes of a layer with its K and V, and of all else
        fit = int((torch.cuda.mem_get_info()[0] - beside) / per_layer)
        config = dataclasses.replace(config, num_layers=max(1, min(config.num_layers, fit)))
    weights = {name: torch.empty(shape, dtype=dtype, device=place).normal_(std=0.02)
               for name, shape in parameter_shapes(config).items()}
    if dry:
        return {"rows": timed_steps(device, weights, config, (2,), 20, lambda: float("nan"), repeats=1)}
    return {"rows": timed_steps(device, weights, config, (1, 32), 1024)}


def small(dry: bool) -> dict[str, Any]:
    """Every kernel once on a small batch: what profilers and sanitizers watch."""
    import numpy as np
    import torch

    from kernels_cupy.heads import Heads
    from kernels_cupy.launch import STEPS
    from kernels_cupy.proof import contract

    device, place = _device(dry)
    heads, lengths = Heads(8, 2, 64, 16, torch.float16), [1, 17, 40, 100]
    batch = contract.Batch.draw(np.random.default_rng(0), heads, [1] * 4, lengths).to(place)
    for step in STEPS:
        batch.check(contract.decode(device, batch, step, 2 if step in (3, 4) else None))
    batch = contract.Batch.draw(np.random.default_rng(0), heads, [1, 17, 3, 60], lengths).to(place)
    for fast in (False, True):
        batch.check(contract.prefill(device, batch, fast))
    return {"kernels": len(STEPS) + 2}


def notebooks(out: Path) -> dict[str, Any]:
    """Notebooks on the GPU, written to another folder: those of the checkout stay as they are."""
    ran = {}
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        command = [sys.executable, str(ROOT / "tools" / "run_notebooks.py"), "--out", str(out / "notebooks"), str(path)]
        ran[path.name] = subprocess.run(command, env={**os.environ, "BROS_REF_DEVICE": "cuda"}).returncode
    return {"exit_codes": ran}


# ----- running them


def run(stage: Stage, out: Path, left_s: float, dry: bool) -> dict[str, Any]:
    """Runs a stage; its output goes to a log. Returns its name, result ("ok", or what kept it) and seconds.

    A dry run has no time limits, so its result does not depend on how busy the machine is.
    """
    if dry and not stage.dry:
        return {"stage": stage.name, "result": "not in a dry run", "seconds": 0.0}
    if left_s < LEAST_S and not dry:
        return {"stage": stage.name, "result": "no time left", "seconds": 0.0}
    if shutil.which(stage.needs) is None and importlib.util.find_spec(stage.needs.replace("-", "_")) is None:
        return {"stage": stage.name, "result": f"{stage.needs} is not installed", "seconds": 0.0}
    command = [part.format(out=out) for part in stage.command]
    command += ["--dry"] if dry and "--stage" in command else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    begin = time.monotonic()
    with open(out / f"{stage.name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                                   env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"})
        try:
            code = process.wait(None if dry else min(stage.limit_s, left_s))
            result = "ok" if code == 0 else f"exit code {code}, see {stage.name}.log"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the stage and what it started
            process.wait()
            result = "out of time"
    return {"stage": stage.name, "result": result, "seconds": round(time.monotonic() - begin, 1)}


def machine(dry: bool) -> dict[str, str]:
    """What the figures depend on."""
    import torch

    def said(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT) if shutil.which(command[0]) else None
        return done.stdout.strip() if done and done.returncode == 0 else "unknown"

    query = ("nvidia-smi", "--format=csv,noheader", "--query-gpu")
    return {"gpu": "none: the emulator" if dry else torch.cuda.get_device_name(),
            "driver": said(*query[:2], f"{query[2]}=driver_version"),
            "clocks (SM, memory)": said(*query[:2], f"{query[2]}=clocks.max.sm,clocks.max.memory"),
            "torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version(),
            "commit": said("git", "rev-parse", "HEAD")}


def collect(out: Path, stages: Sequence[dict[str, Any]], about: dict[str, str]) -> dict[str, Any]:
    """The report so far, also written to gpu_day.json and gpu_day.md."""
    results = {stage["stage"]: json.loads(path.read_text()) for stage in stages
               if stage["result"] == "ok" and (path := out / f"{stage['stage']}.json").exists()}
    report = {"machine": about, "stages": list(stages), "results": results}
    (out / "gpu_day.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu_day.md").write_text(page(report))
    return report


def page(report: dict[str, Any] | None) -> str:
    """docs/gpu.md: the last results, or that there are none."""
    head = "# On a GPU\n\nWritten by `tools/gpu_day.py`. "
    if report is None:
        return head + ("**Not measured yet:** no GPU was at hand. Kernels are proven by execution on the CPU "
                       "(`kernels_cupy/README.md`).\n\nOn a machine with a GPU, in eight minutes: "
                       "`PYTHONPATH=. python tools/gpu_day.py --out out/gpu --docs`\n")
    parts = [head + "Times are medians of CUDA graph replays, the L2 cache flushed before each call.\n",
             _table([{"": name, "machine": value} for name, value in report["machine"].items()]),
             *([_table(report["stages"])] if report["stages"] else [])]
    results = report["results"]
    for title, rows in (("Decode", results.get("decode", {}).get("rows")),
                        ("Prefill", results.get("prefill_and_copies", {}).get("prefill")),
                        ("Copies of slots", results.get("prefill_and_copies", {}).get("copies")),
                        ("Decode steps of the engine", results.get("engine_steps", {}).get("rows"))):
        if rows:
            parts.append(f"## {title}\n\n" + _table([{name: value for name, value in row.items()
                                                     if name != "samples_us"} for row in rows]))
    if "verify" in results:
        parts.append(f"## Verified\n\n{results['verify']['checked']} runs against float64, "
                     f"{len(results['verify']['wrong'])} wrong.\n")
    return "\n".join(parts)


def estimates() -> str:
    """docs/gpu.md's last section: a decode step counted, and its time estimated; the same on every machine."""
    from bros_ref.evaluation.bench.gpu_step import estimate_steps, markdown

    return "\n" + markdown(estimate_steps())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "-" if value != value else f"{value:.4g}"
        return str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one stage, or the day. Returns the exit code: 0 if no kernel was wrong and no stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder of the results")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all stages")
    parser.add_argument("--dry", action="store_true", help="on the emulator: verify, time nothing")
    parser.add_argument("--docs", action="store_true", help="keep the results in docs/gpu.json and docs/gpu.md")
    parser.add_argument("--estimates", action="store_true", help="only write the estimates of docs/gpu.md anew")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.estimates:
        PAGE.write_text(page(json.loads(KEPT.read_text()) if KEPT.exists() else None) + estimates())
        return 0
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        functions = {"verify": verify, "decode": decode, "prefill_and_copies": prefill_and_copies,
                     "engine_steps": engine_steps, "small": small}
        found = notebooks(options.out) if options.stage == "notebooks" else functions[options.stage](options.dry)
        (options.out / f"{options.stage}.json").write_text(json.dumps(found, indent=1) + "\n")
        return 1 if found.get("wrong") or any(found.get("exit_codes", {}).values()) else 0
    begin, done, about = time.monotonic(), [], machine(options.dry)
    report = collect(options.out, done, about)
    for stage in STAGES:
        done.append(run(stage, options.out, options.budget_s - (time.monotonic() - begin), options.dry))
        print(f"{stage.name:20} {done[-1]['result']:30} {done[-1]['seconds']:6} s", flush=True)
        report = collect(options.out, done, about)
    if options.docs and not options.dry:
        KEPT.write_text(json.dumps(report, indent=1) + "\n")
        PAGE.write_text(page(report) + estimates())
    return int(any(stage["result"].startswith(("exit code", "out of time")) for stage in done))


if __name__ == "__main__":
    sys.exit(main())
