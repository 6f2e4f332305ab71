"""`bros-ref`: the command line. It parses, calls the library, prints a table for people and JSON for programs.

Exit status 0 on success, 2 on bad usage or bad input with one line on standard error, never a traceback for those;
130 after Ctrl-C, with the trace so far saved where a run was to save one. With `--json -` the result is all that
standard output gets; tables and progress go to standard error.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from bros_ref.cli import accuracy, kernels, serve, simulation
from bros_ref.cli.common import (
    BackendOption,
    ChunkedOption,
    ClassOption,
    CountOption,
    DeviceOption,
    JsonOption,
    KvDtypeOption,
    ModelOption,
    OutOption,
    RefitOption,
    RequestsOption,
    SeedOption,
    SlowdownOption,
    SplitOption,
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
    say,
    set_threads,
    write_json,
)
from bros_ref.cli.terminal import abandon_stdout, prepare_streams, printable

COMMAND_MODULES = (accuracy, kernels, serve, simulation)  # imported because each adds its commands to `app`


def main() -> None:
    """The command line; `bros_ref.__main__` is the console script."""
    prepare_streams()
    try:
        status = app(standalone_mode=False)  # None, or the status of a command that ended by typer.Exit or Ctrl-C
        sys.stdout.flush()  # a full disk must be told here, not ignored at exit
        sys.exit(status)
    except typer.TyperException as error:
        _quit(f"bros-ref: {error.format_message()}")
    except BrokenPipeError:  # who read the output, such as `head`, has seen enough
        abandon_stdout()
        sys.exit(1)
    except (ValueError, OSError) as error:
        _quit(f"bros-ref: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        _quit(f"bros-ref: {missing_package(error)}")
    except (KeyboardInterrupt, typer.Abort):  # outside a command
        sys.exit(130)


def _quit(message: str) -> None:
    print(printable(message, sys.stderr), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        abandon_stdout()
    sys.exit(2)


@app.command()
def generate(prompt: str, model: ModelOption = "smollm2",
             max_tokens: CountOption = 64,
             temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
             top_p: float = 1.0, stop: StopOption = None,
             device: DeviceOption = "auto", backend: BackendOption = "auto", tp: SplitOption = 1,
             threads: ThreadsOption = 0,
             control_tokens: Annotated[bool, typer.Option("--control-tokens", help=(
                 "Control tokens that the prompt spells, such as <|im_end|>, are meant; default: text."))] = False,
             seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """One answer, streamed: the quickest way to try it."""
    from bros_ref.config import cdiv
    from bros_ref.engine.build import LiveSettings, make_engine, make_runner
    from bros_ref.request import Request, RequestClass, SamplingParams
    from bros_ref.trace.metrics import summarise

    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt's character {error.start} is no text in this terminal's encoding") from error
    sampling = SamplingParams(max_tokens, temperature, top_p, seed, tuple(stop or ()))
    loaded = _load(model, device, threads, seed, backend, tp)
    token_ids = loaded.tokenizer.chat(prompt, control_tokens=control_tokens)
    longest = min(len(token_ids) + max_tokens, loaded.config.max_context_tokens)  # more is refused by the engine
    settings = LiveSettings(kv_blocks=cdiv(longest, 16), seed=seed)
    engine = make_engine("vllm-fcfs", loaded, make_runner(loaded, settings), settings)
    request = Request("prompt", RequestClass.BEST_EFFORT, token_ids, sampling)
    out, pieces = sys.stderr if json_path == "-" else sys.stdout, list[str]()
    engine.add_request(request, lambda _, piece: pieces.append(piece))
    while engine.has_unfinished:
        engine.step()
        print(printable("".join(pieces), out), end="", flush=True, file=out)  # not in the callback: its failure is ours
        pieces.clear()
    print(file=out)
    assert engine.trace is not None
    write_json(json_path, "generate", seed, runs=[summarise(engine.trace)], text=engine.streams["prompt"].text,
                finish_reason=request.status.value)


@app.command()
def demo(policies: Annotated[str, typer.Option(help="Comma-separated.")] = "vllm-priority,bros",
         out: OutOption = Path("out/demo"),
         model: ModelOption = "smollm2", device: DeviceOption = "auto", tp: SplitOption = 1,
         threads: ThreadsOption = 0, refit: RefitOption = False, seed: SeedOption = 0,
         json_path: JsonOption = None) -> None:
    """The main job: a real model serves urgent questions and a batch of documents, under KV pressure, per policy."""
    from bros_ref.cli.tables import results_table
    from bros_ref.engine.build import LiveSettings, make_engine, make_runner, request_from_item
    from bros_ref.engine.serve import keep_class
    from bros_ref.evaluation.demo import demo_items, pool_blocks
    from bros_ref.trace.metrics import summarise
    from bros_ref.viz.figures.report import featured_trace, write_report
    from bros_ref.viz.widgets.schedule_player import SchedulePlayer

    names, console = parse_policies(policies), make_console(json_path)
    loaded = _load(model, device, threads, seed, tp=tp)
    items = demo_items(loaded, seed)
    settings = LiveSettings(kv_blocks=pool_blocks(items, 8, 16), max_num_seqs=8, max_num_batched_tokens=256,
                            chunked_prefill=True, seed=seed)
    runner = make_runner(loaded, settings)
    latency = _fit(runner, settings.max_num_seqs, loaded.name, refit, console)
    traces, samples, interrupted = [], dict[str, str](), False
    for policy in names:
        engine = make_engine(policy, loaded, runner, settings, copy.deepcopy(latency))
        interrupted = _serve(engine, keep_class(items, policy),
                             lambda item: request_from_item(item, loaded, seed, to_length=False), policy, console)
        assert engine.trace is not None
        traces.append(engine.trace)
        samples = samples or _sample_answers(engine, items)
        if interrupted:
            break
    runs = [summarise(trace) for trace in traces]
    title = f"{loaded.name} on {loaded.device}, {settings.kv_blocks} blocks of {settings.block_size}, seed {seed}"
    for question, answer in list(samples.items())[:3]:
        console.print(Text.assemble((question, "bold"), " ", printable(answer, console.file)), soft_wrap=True)
    console.print(results_table(runs, title))
    result = write_json(json_path, "demo", seed, runs=runs, interrupted=interrupted)
    for trace in traces:
        trace.save(out / f"trace-{trace.policy}.json")
    featured = featured_trace(traces)
    player = SchedulePlayer(featured).to_html() if featured.steps else ""
    write_report(out / "report.html", traces, runs, "Real-time and best-effort on one model", samples, player)
    write_json(str(out / "summary.json"), "demo", seed, runs=runs, interrupted=interrupted,
               environment=result["environment"])
    say(console, f"report: {out / 'report.html'}")
    if interrupted:
        _end_interrupted(console, f"traces: {out}")


@app.command("serve-trace")
def serve_trace(workload: Annotated[list[Path], typer.Option(help="A workload file, - for stdin; repeat to merge.")],
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
                rt_slowdown: SlowdownOption = None, kv_dtype: KvDtypeOption = "auto", tp: SplitOption = 1,
                threads: ThreadsOption = 0, refit: RefitOption = False, seed: SeedOption = 0,
                json_path: JsonOption = None) -> None:
    """The live engine on a workload file, wall clock."""
    from bros_ref.cli.tables import results_table
    from bros_ref.engine.build import LiveSettings, make_engine, make_runner, request_from_item
    from bros_ref.engine.serve import keep_class
    from bros_ref.request import SLO, RequestClass
    from bros_ref.trace.metrics import summarise
    from bros_ref.workload.files import read_workload
    from bros_ref.workload.generate import merge

    if "," in policy:
        raise ValueError(f"--policy takes one policy, got {policy!r}; `demo` and `bench hybrid` compare several")
    [name], console, slo = parse_policies(policy), make_console(json_path), SLO(ttft_slo_s, tpot_slo_s)
    if request_class not in (None, "rt", "be"):
        raise ValueError(f"--class must be rt or be, got {request_class!r}")
    chosen_class = None if request_class is None else RequestClass(request_class)
    items = keep_class(merge(*(read_workload(path, chosen_class, slo, time_unit_s) for path in workload)), name)
    if not items:
        raise ValueError(f"policy {name} serves one class only, and the workload has no request of it")
    settings = LiveSettings(kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, chunked_prefill, seed,
                            rt_slowdown, kv_dtype)
    loaded = _load(model, device, threads, seed, backend, tp)
    runner = make_runner(loaded, settings)
    latency = _fit(runner, max_num_seqs, loaded.name, refit, console)
    engine = make_engine(name, loaded, runner, settings, latency)
    interrupted = _serve(engine, items, lambda item: request_from_item(item, loaded, seed), name, console, until_s)
    assert engine.trace is not None
    runs = [summarise(engine.trace)]
    title = f"{loaded.name} on {loaded.device}, {kv_blocks} blocks of {block_size}, seed {seed}"
    console.print(results_table(runs, title))
    write_json(json_path, "serve-trace", seed, runs=runs, interrupted=interrupted)
    if trace_path is not None:
        engine.trace.save(trace_path)
    if interrupted:
        _end_interrupted(console, f"trace: {trace_path}" if trace_path else "no --trace was named, so none is saved")


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
                         peers: Annotated[bool, typer.Option("--peers", help=(
                             "Also vLLM and llama.cpp (xllamacpp), where installed."))] = False,
                         vllm_python: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help=(
                             "A Python that has vLLM. Default: that of `make test-vllm`, else this one."))] = None,
                         threads: ThreadsOption = 0, seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """The engine against transformers.generate and other engines, alternated, and against the machine."""
    from bros_ref.cli.tables import engine_table
    from bros_ref.evaluation.bench.engine import CASES, bench_engine
    from bros_ref.evaluation.bench.engine_peers import PEERS

    console = make_console(json_path)
    loaded = _load(model, "cpu", threads, seed)
    chosen = CASES if cases is None else tuple(case.strip() for case in cases.split(","))
    with progress(console, "engine", rounds * len(chosen)) as advance:
        result = bench_engine(loaded, chosen, rounds, seed, lambda _: advance(1), PEERS if peers else PEERS[:1],
                              vllm_python)
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
    from bros_ref.engine.serve import ServeInterrupted
    from bros_ref.evaluation.bench.hybrid import DEFAULT_POLICIES, bench_hybrid, parse_clock, parse_step
    from bros_ref.evaluation.statistics import interval_rows
    from bros_ref.request import SLO

    if report is not None:
        from bros_ref.viz.figures.report import write_report  # a missing plotly shows before the run
    names = list(DEFAULT_POLICIES) if policies is None else parse_policies(policies)
    slo, console, how, step = SLO(ttft_slo_s, tpot_slo_s), make_console(json_path), parse_clock(clock), parse_step(
        modelled_step)
    loaded = _load(model, device, threads, seed)
    try:
        with progress(console, "hybrid", seeds * len(names)) as advance:
            runs, traces = bench_hybrid(loaded, names, slo, seeds, seed, how, step, num_be=be_requests,
                                        num_rt=rt_requests, refit=refit, on_run=lambda *_: advance(1))
    except ServeInterrupted as stop:
        _end_bench(stop.trace, report, console, json_path, seed)
    timing = f"modelled steps of {step[0]:g} s + {step[1]:g} s per token" if how == "modelled" else "wall clock"
    title = (f"{loaded.name} on {loaded.device}, {timing}, SLO {ttft_slo_s} s / {tpot_slo_s} s, no prefix cache; "
             f"median of {seeds} rounds [95 % interval of the mean]")
    rows = [{"clock": how, **row} for row in interval_rows(runs)]
    console.print(median_table(rows, title))
    write_json(json_path, "bench hybrid", seed, clock=how, modelled_step=list(step) if how == "modelled" else None,
               rows=rows, runs=runs)
    if report is not None:
        first = [next(run for run in runs if run["policy"] == name) for name in names]
        write_report(report, traces, first, "Hybrid serving under KV pressure", {})


# -- what these commands share ----------------------------------------------------------------------------------------


def _load(model: str, device: str, threads: int, seed: int, backend: str = "auto", tp: int = 1) -> Any:
    from bros_ref.engine.build import load_model
    from bros_ref.engine.ranks import RankFailed

    set_threads(threads)
    try:
        return load_model(model, device, seed, backend, tp)
    except RankFailed as error:
        raise ValueError(f"--tp {tp}: {error}") from error


def _fit(runner: Any, max_num_seqs: int, name: str, refit: bool, console: Console) -> Any:
    from bros_ref.engine.profile import fit_latency_model

    with progress(console, "latency model", 1.0) as advance:
        last = 0.0

        def on_progress(done: float) -> None:
            nonlocal last
            advance(done - last)
            last = done

        return fit_latency_model(runner, max_num_seqs, name, refit=refit, on_progress=on_progress)


def _serve(engine: Any, items: list[Any], to_request: Callable[[Any], Any], policy: str, console: Console,
           until_s: float = math.inf) -> bool:
    """Serves the items under a bar, then tells what was refused and what failed. True if Ctrl-C ended it: the trace
    then holds what was recorded so far."""
    from bros_ref.engine.serve import ServeInterrupted, serve
    from bros_ref.workload.generate import Workload

    interrupted = False
    with progress(console, f"{policy}: {len(items)} requests", len(items)) as advance:
        try:
            failures = serve(engine, Workload(items), to_request, until_s, on_step=lambda ended: advance(len(ended)))
        except ServeInterrupted as stop:
            failures, interrupted = stop.failures, True
    for request_id, reason in engine.trace.rejected.items():  # they ended nobody else; why must not be lost with them
        say(console, f"refused {request_id}: {reason}", "yellow")
    for failure in failures:
        say(console, str(failure), "red")
    return interrupted


def _end_bench(trace: Any, report: Path | None, console: Console, json_path: str | None, seed: int) -> NoReturn:
    """After Ctrl-C: the run that it ended, whose trace goes beside the report."""
    from bros_ref.cli.tables import results_table
    from bros_ref.trace.metrics import summarise

    runs = [summarise(trace)]
    console.print(results_table(runs, "The run that was interrupted"))
    write_json(json_path, "bench hybrid", seed, runs=runs, interrupted=True)
    if report is None:
        _end_interrupted(console, "no --report was named, so no trace is saved")
    beside = report.with_suffix(".trace.json")
    trace.save(beside)
    _end_interrupted(console, f"trace: {beside}")


def _end_interrupted(console: Console, saved: str) -> NoReturn:
    """After Ctrl-C: says that this is not all, and where it is; exit status 130."""
    say(console, f"interrupted: what was served until then is above; {saved}", "yellow")
    raise typer.Exit(130)


def _sample_answers(engine: Any, items: list[Any]) -> dict[str, str]:
    """Prompt -> answer of the first real-time requests."""
    asked = [item.prompt for item in items if item.slo is not None]
    return {prompt: engine.streams[f"rt-{index}"].text for index, prompt in enumerate(asked)
            if f"rt-{index}" in engine.streams}
