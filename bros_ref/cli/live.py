"""`bros-ref`: the command line. It parses, calls the library, prints a table for people and JSON for programs.

Exit status 0 on success, 2 on bad usage or bad input with one line on standard error, never a traceback for those.
With `--json -` the result is all that standard output gets; tables and progress go to standard error.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from bros_ref.cli import kernels, serve, simulation
from bros_ref.cli.common import (
    BackendOption,
    ChunkedOption,
    ClassOption,
    CountOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OutOption,
    RefitOption,
    RequestsOption,
    SeedOption,
    StopOption,
    ThreadsOption,
    TimeUnitOption,
    TpotOption,
    TtftOption,
    app,
    bench_app,
    make_console,
    missing_package,
    output_file,
    parse_policies,
    progress,
    write_json,
)

COMMAND_MODULES = (kernels, serve, simulation)  # imported because each adds its commands to `app`


def main() -> None:
    """The console script."""
    try:
        sys.exit(app(standalone_mode=False))  # None, or the status of a command that ended by typer.Exit or Ctrl-C
    except typer.TyperException as error:
        _quit(f"bros-ref: {error.format_message()}")
    except (ValueError, OSError) as error:
        _quit(f"bros-ref: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        _quit(f"bros-ref: {missing_package(error)}")
    except (KeyboardInterrupt, typer.Abort):  # outside a command
        sys.exit(130)


def _quit(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


@app.command()
def generate(prompt: str, model: ModelOption = "smollm2",
             max_tokens: CountOption = 64,
             temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
             top_p: float = 1.0, stop: StopOption = None,
             device: DeviceOption = "auto", backend: BackendOption = "auto", threads: ThreadsOption = 0,
             seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """One answer, streamed: the quickest sign of life."""
    from bros_ref.engine.build import LiveSettings, make_engine, make_runner
    from bros_ref.request import Request, RequestClass, SamplingParams
    from bros_ref.trace.metrics import summarise

    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text")
    sampling = SamplingParams(max_tokens, temperature, top_p, seed, tuple(stop or ()))
    loaded = _load(model, device, threads, seed, backend)
    token_ids = loaded.tokenizer.chat(prompt)
    longest = min(len(token_ids) + max_tokens, loaded.config.max_context_tokens)  # more is refused by the engine
    settings = LiveSettings(kv_blocks=-(-longest // 16), seed=seed)
    engine = make_engine("vllm-fcfs", loaded, make_runner(loaded, settings), settings)
    request = Request("prompt", RequestClass.BEST_EFFORT, token_ids, sampling)
    out = sys.stderr if json_path == "-" else sys.stdout
    engine.add_request(request, lambda _, piece: print(piece, end="", flush=True, file=out))
    while engine.has_unfinished:
        engine.step()
    print(file=out)
    assert engine.trace is not None
    write_json(json_path, "generate", seed, runs=[summarise(engine.trace)], text=engine.streams["prompt"].text,
                finish_reason=request.status.value)


@app.command()
def demo(policies: Annotated[str, typer.Option(help="Comma-separated.")] = "vllm-priority,bros",
         out: OutOption = Path("out/demo"),
         model: ModelOption = "smollm2", device: DeviceOption = "auto", threads: ThreadsOption = 0,
         refit: RefitOption = False, seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """The main job: a real model serves urgent questions and a batch of documents, under KV pressure, per policy."""
    from bros_ref.cli.tables import results_table
    from bros_ref.engine.build import LiveSettings, make_engine, make_runner, request_from_item
    from bros_ref.engine.serve import keep_class, serve
    from bros_ref.evaluation.demo import demo_items, pool_blocks
    from bros_ref.trace.metrics import summarise
    from bros_ref.viz.figures.report import write_report
    from bros_ref.workload.generate import Workload

    names, console = parse_policies(policies), make_console(json_path)
    loaded = _load(model, device, threads, seed)
    items = demo_items(loaded, seed)
    settings = LiveSettings(kv_blocks=pool_blocks(items, 8, 16), max_num_seqs=8, max_num_batched_tokens=256,
                            chunked_prefill=True, seed=seed)
    runner = make_runner(loaded, settings)
    latency = _fit(runner, settings.max_num_seqs, loaded.name, refit, console)
    traces, samples = [], dict[str, str]()
    for policy in names:
        engine = make_engine(policy, loaded, runner, settings, copy.deepcopy(latency))
        chosen = keep_class(items, policy)
        with progress(console, f"{policy}: {len(chosen)} requests", len(chosen)) as advance:
            failures = serve(engine, Workload(chosen),
                             lambda item: request_from_item(item, loaded, seed, to_length=False),
                             on_step=lambda ended: advance(len(ended)))
        assert engine.trace is not None
        _tell(engine.trace, failures, console)
        engine.trace.save(out / f"trace-{policy}.json")
        traces.append(engine.trace)
        samples = samples or _sample_answers(engine, items)
    runs = [summarise(trace) for trace in traces]
    title = f"{loaded.name} on {loaded.device}, {settings.kv_blocks} blocks of {settings.block_size}, seed {seed}"
    for question, answer in list(samples.items())[:3]:
        console.print(Text.assemble((question, "bold"), " ", answer), soft_wrap=True)
    console.print(results_table(runs, title))
    write_report(out / "report.html", traces, runs, "Real-time and best-effort on one model", samples)
    result = write_json(str(out / "summary.json"), "demo", seed, runs=runs)
    write_json(json_path, "demo", seed, runs=runs, environment=result["environment"])
    console.print(f"report: {out / 'report.html'}")


@app.command("serve-trace")
def serve_trace(workload: Annotated[list[Path], typer.Option(help="Workload file; repeat to merge several.")],
                policy: Annotated[str, typer.Option()] = "bros", model: ModelOption = "smollm2",
                device: DeviceOption = "auto", backend: BackendOption = "auto",
                request_class: ClassOption = None, time_unit_s: TimeUnitOption = None,
                ttft_slo_s: TtftOption = 1.0, tpot_slo_s: TpotOption = 0.25,
                kv_blocks: CountOption = 256, block_size: CountOption = 16,
                max_num_seqs: CountOption = 8,
                max_num_batched_tokens: CountOption = 256,
                chunked_prefill: ChunkedOption = None,
                until_s: Annotated[float, typer.Option(min=0.0, help="Stop after this many seconds.")] = float("inf"),
                trace_path: Annotated[Path | None, typer.Option("--trace", callback=output_file,
                                                                help="Save the trace here.")] = None,
                threads: ThreadsOption = 0, refit: RefitOption = False, seed: SeedOption = 0,
                json_path: JsonOption = None) -> None:
    """The live engine on a workload file, wall clock."""
    from bros_ref.cli.tables import results_table
    from bros_ref.engine.build import LiveSettings, make_engine, make_runner, request_from_item
    from bros_ref.engine.serve import keep_class, serve
    from bros_ref.request import SLO, RequestClass
    from bros_ref.trace.metrics import summarise
    from bros_ref.workload.files import read_workload
    from bros_ref.workload.generate import Workload, merge

    if "," in policy:
        raise ValueError(f"--policy takes one policy, got {policy!r}; `demo` and `bench hybrid` compare several")
    [name], console, slo = parse_policies(policy), make_console(json_path), SLO(ttft_slo_s, tpot_slo_s)
    if request_class not in (None, "rt", "be"):
        raise ValueError(f"--class must be rt or be, got {request_class!r}")
    chosen_class = None if request_class is None else RequestClass(request_class)
    items = keep_class(merge(*(read_workload(path, chosen_class, slo, time_unit_s) for path in workload)), name)
    if not items:
        raise ValueError(f"policy {name} serves one class only, and the workload has no request of it")
    settings = LiveSettings(kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, chunked_prefill, seed)
    loaded = _load(model, device, threads, seed, backend)
    runner = make_runner(loaded, settings)
    latency = _fit(runner, max_num_seqs, loaded.name, refit, console)
    engine = make_engine(name, loaded, runner, settings, latency)
    with progress(console, f"{name}: {len(items)} requests", len(items)) as advance:
        failures = serve(engine, Workload(items), lambda item: request_from_item(item, loaded, seed), until_s,
                         on_step=lambda ended: advance(len(ended)))
    assert engine.trace is not None
    _tell(engine.trace, failures, console)
    if trace_path is not None:
        engine.trace.save(trace_path)
    runs = [summarise(engine.trace)]
    title = f"{loaded.name} on {loaded.device}, {kv_blocks} blocks of {block_size}, seed {seed}"
    console.print(results_table(runs, title))
    write_json(json_path, "serve-trace", seed, runs=runs)


@bench_app.command("scheduler")
def bench_scheduler_command(policies: Annotated[str, typer.Option()] = "bros,vllm-priority,vllm-fcfs",
                            running: Annotated[str, typer.Option(help="Sizes of the batch.")] = "64,256,1024",
                            waiting: Annotated[int, typer.Option(min=0)] = 10_000,
                            rounds: CountOption = 9, seed: SeedOption = 0,
                            json_path: JsonOption = None) -> None:
    """What deciding costs, per scheduled request."""
    from bros_ref.cli.tables import scheduler_table
    from bros_ref.evaluation.bench.scheduler import as_json, bench_scheduler

    if not all(size.strip().isdecimal() and 0 < int(size) <= 100_000 for size in running.split(",")):
        raise ValueError(f"--running needs numbers from 1 to 100000 separated by commas, got {running!r}")
    names, sizes = parse_policies(policies), [int(size) for size in running.split(",")]
    rows, slopes = bench_scheduler(names, sizes, waiting, rounds)
    result = as_json(rows, slopes)
    make_console(json_path).print(scheduler_table([vars(row) for row in rows], slopes))
    write_json(json_path, "bench scheduler", seed, **result)


@bench_app.command("engine")
def bench_engine_command(cases: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
                         model: ModelOption = "smollm2", rounds: CountOption = 3,
                         threads: ThreadsOption = 0, seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """The engine against transformers.generate, alternated, and against the machine."""
    from bros_ref.cli.tables import engine_table
    from bros_ref.evaluation.bench.engine import CASES, bench_engine

    console = make_console(json_path)
    loaded = _load(model, "cpu", threads, seed)
    chosen = CASES if cases is None else tuple(case.strip() for case in cases.split(","))
    with progress(console, "engine", rounds * len(chosen)) as advance:
        result = bench_engine(loaded, chosen, rounds, seed, on_case=lambda _: advance(1))
    console.print(engine_table(result))
    write_json(json_path, "bench engine", seed, **result)


@bench_app.command("hybrid")
def bench_hybrid_command(policies: Annotated[str | None, typer.Option(help="Default: both bounds, six others.")] = None,
                         model: ModelOption = "smollm2",
                         clock: Annotated[str, typer.Option(help="wall, or modelled: the model computes every token, "
                                                                 "and a step takes --modelled-step.")] = "wall",
                         modelled_step: Annotated[str, typer.Option(metavar="A,B", help=(
                             "Seconds per step and per token."))] = "0.032,0.0025",
                         seeds: Annotated[int, typer.Option(min=1, help="Rounds, each with arrivals of its own.")] = 5,
                         be_requests: RequestsOption = None, rt_requests: RequestsOption = None,
                         ttft_slo_s: TtftOption = 0.6, tpot_slo_s: TpotOption = 0.4, device: DeviceOption = "auto",
                         threads: ThreadsOption = 0, refit: RefitOption = False, seed: SeedOption = 0,
                         report: Annotated[Path | None, typer.Option(callback=output_file,
                                                                     help="Write an HTML report here.")] = None,
                         json_path: JsonOption = None) -> None:
    """Every policy serves the same hybrid workload live, under KV pressure, in rounds that alternate the policies."""
    from bros_ref.cli.tables import median_table
    from bros_ref.evaluation.bench.hybrid import DEFAULT_POLICIES, bench_hybrid, parse_clock, parse_step
    from bros_ref.evaluation.statistics import interval_rows
    from bros_ref.request import SLO
    from bros_ref.viz.figures.report import write_report

    names = list(DEFAULT_POLICIES) if policies is None else parse_policies(policies)
    slo, console, how, step = SLO(ttft_slo_s, tpot_slo_s), make_console(json_path), parse_clock(clock), parse_step(
        modelled_step)
    loaded = _load(model, device, threads, seed)
    with progress(console, "hybrid", seeds * len(names)) as advance:
        runs, traces = bench_hybrid(loaded, names, slo, seeds, seed, how, step, num_be=be_requests, num_rt=rt_requests,
                                    refit=refit, on_run=lambda *_: advance(1))
    timing = f"modelled steps of {step[0]:g} s + {step[1]:g} s per token" if how == "modelled" else "wall clock"
    title = (f"{loaded.name} on {loaded.device}, {timing}, SLO {ttft_slo_s} s / {tpot_slo_s} s, no prefix cache; "
             f"median of {seeds} rounds [95 % interval of the mean]")
    rows = [{"clock": how, **row} for row in interval_rows(runs)]
    console.print(median_table(rows, title))
    if report is not None:
        first = [next(run for run in runs if run["policy"] == name) for name in names]
        write_report(report, traces, first, "Hybrid serving under KV pressure", {})
    write_json(json_path, "bench hybrid", seed, clock=how, modelled_step=list(step) if how == "modelled" else None,
               rows=rows, runs=runs)


# -- what these commands share ----------------------------------------------------------------------------------------


def _load(model: str, device: str, threads: int, seed: int, backend: str = "auto") -> Any:
    import torch

    from bros_ref.engine.build import load_model

    if threads:
        torch.set_num_threads(threads)
    return load_model(model, device, seed, backend)


def _fit(runner: Any, max_num_seqs: int, name: str, refit: bool, console: Console) -> Any:
    from bros_ref.engine.profile import fit_latency_model

    with progress(console, "latency model", 1.0) as advance:
        last = 0.0

        def on_progress(done: float) -> None:
            nonlocal last
            advance(done - last)
            last = done

        return fit_latency_model(runner, max_num_seqs, name, refit=refit, on_progress=on_progress)


def _tell(trace: Any, failures: list[Any], console: Console) -> None:
    """Refused requests and failed steps ended nobody else; why they did must not be lost with them."""
    for request_id, reason in trace.rejected.items():
        console.print(f"refused {request_id}: {reason}", style="yellow", highlight=False)
    for failure in failures:
        console.print(str(failure), style="red", highlight=False)


def _sample_answers(engine: Any, items: list[Any]) -> dict[str, str]:
    """Prompt -> answer of the first real-time requests."""
    asked = [item.prompt for item in items if item.slo is not None]
    return {prompt: engine.streams[f"rt-{index}"].text for index, prompt in enumerate(asked)
            if f"rt-{index}" in engine.streams}
