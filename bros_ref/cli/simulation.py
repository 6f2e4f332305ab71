"""The commands on virtual time: `simulate`, `reproduce`, `bench simulator`. They need no model and no torch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bros_ref.cli.common import (
    ChunkedOption,
    ClassOption,
    CountOption,
    JsonOption,
    SeedOption,
    SlowdownOption,
    TimeUnitOption,
    TpotOption,
    TtftOption,
    app,
    bench_app,
    make_console,
    output_file,
    output_folder,
    parse_policies,
    progress,
    say,
    tell_refusals,
    write_json,
)

GpuOption = Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100-80gb, h200-141gb, rtx4090 or l4.")]
ShapeOption = Annotated[str, typer.Option("--model", help="opt-13b, opt-30b, llama-3-70b, llama-3-8b, llama-2-7b, ...")]
TpOption = Annotated[int, typer.Option(min=1, help="GPUs, by tensor parallelism.")]
ProcessesOption = Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one a core.")]
RtLengthsOption = Annotated[Path | None, typer.Option(help=(
    "paper: a file of prompt and output lengths to draw from, in the place of the fitted ShareGPT distribution."))]
PAPER_POLICIES = "vllm-fcfs,vllm-priority,bros-rr,bros"


@app.command()
def simulate(workload: Annotated[list[str], typer.Option(help="paper, or a file, - for stdin; repeat to merge.")],
             gpu: GpuOption = "a100-40gb", model: ShapeOption = "opt-13b", tp: TpOption = 2,
             policies: Annotated[str, typer.Option(help="Comma-separated.")] = PAPER_POLICIES,
             rt_rate: Annotated[float, typer.Option(help="paper: RT requests per second.")] = 2.0,
             duration_s: Annotated[float | None, typer.Option(help="Default: 600 for paper, a file's end.")] = None,
             ttft_slo_s: TtftOption = 0.4, tpot_slo_s: TpotOption = 0.2,
             kv_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what the memory leaves.")] = None,
             rt_lengths: RtLengthsOption = None,
             be_batch: Annotated[int | None, typer.Option(min=0, help="paper: BE requests of a batch.")] = None,
             block_size: CountOption = 16, max_num_seqs: CountOption = 256, max_num_batched_tokens: CountOption = 2048,
             chunked_prefill: ChunkedOption = None,
             rt_slowdown: SlowdownOption = None,
             request_class: ClassOption = None,
             time_unit_s: TimeUnitOption = None,
             seeds: Annotated[int, typer.Option(min=1, help="Runs a policy, seeds --seed, --seed + 1, ...")] = 1,
             processes: ProcessesOption = 0,
             report: Annotated[Path | None, typer.Option(callback=output_file,
                                                         help="Write an HTML report of the first seed here.")] = None,
             seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """The live system's scheduler and KV accounting, on a virtual clock and a GPU cost model."""
    from bros_ref.cli.tables import interval_table, results_table
    from bros_ref.evaluation.statistics import interval_rows
    from bros_ref.request import SLO
    from bros_ref.simulator.simulate import Job, SimulationSettings, run_all

    names, console, slo = parse_policies(policies), make_console(json_path), SLO(ttft_slo_s, tpot_slo_s)
    settings = SimulationSettings(gpu, model, tp, kv_tokens, block_size, max_num_seqs, max_num_batched_tokens,
                                  chunked_prefill, seed, rt_slowdown)
    arrivals = _arrivals(workload, settings, rt_rate, duration_s, be_batch, slo, request_class, time_unit_s, rt_lengths)
    if seeds > 1 and "paper" not in workload:
        raise ValueError(f"--seeds {seeds}: a workload file has nothing random in it, so every run would be the same; "
                         "leave it out, or use --workload paper")
    jobs = [Job(name, name, replace(settings, seed=seed + index), arrivals)
            for name in names for index in range(seeds)]
    with progress(console, f"{model} on {tp} x {gpu}", len(jobs)) as advance:
        runs = run_all(jobs, processes, lambda _: advance(1))
    pool = f"{settings.num_blocks * block_size:,} KV tokens"
    title = f"Simulated: {model}, {tp} x {gpu} ({settings.basis}), {pool}, SLO {ttft_slo_s}/{tpot_slo_s} s, seed {seed}"
    tell_refusals(console, runs)
    console.print(results_table([run for run in runs if run["seed"] == seed], title))
    intervals = interval_rows(runs)
    if seeds > 1:
        console.print(interval_table(intervals, f"Mean and 95 % interval over {seeds} seeds"))
    write_json(json_path, "simulate", seed, runs=runs, intervals=intervals)
    if report is not None:
        _write_report(report, names, settings, arrivals, title)


def _arrivals(workload: list[str], settings: Any, rt_rate: float, duration_s: float | None, be_batch: int | None,
              slo: Any, request_class: str | None, time_unit_s: float | None, rt_lengths: Path | None) -> Any:
    from bros_ref.request import RequestClass
    from bros_ref.simulator.cost_model import model_named
    from bros_ref.workload.files import read_lengths, read_workload
    from bros_ref.workload.generate import merge
    from bros_ref.workload.paper import PaperWorkload, be_batch_for

    if "paper" in workload:
        if len(workload) > 1:
            raise ValueError("--workload paper stands alone; it cannot be merged with files")
        batch = be_batch_for(settings.num_blocks * settings.block_size) if be_batch is None else be_batch
        lengths = "sharegpt" if rt_lengths is None else read_lengths(
            rt_lengths, model_named(settings.model).max_context_tokens)
        return PaperWorkload(rt_rate, 600.0 if duration_s is None else duration_s, batch, slo, lengths)
    if rt_lengths is not None:
        raise ValueError("--rt-lengths goes with --workload paper; a workload file has lengths of its own")
    if request_class not in (None, "rt", "be"):
        raise ValueError(f"--class must be rt or be, got {request_class!r}")
    chosen = None if request_class is None else RequestClass(request_class)
    items = merge(*(read_workload(Path(path), chosen, slo, time_unit_s) for path in workload))
    kept = tuple(item for item in items if duration_s is None or item.arrival_s < duration_s)
    if not kept:
        raise ValueError(f"nothing to simulate: {', '.join(workload)} has no request before --duration-s {duration_s}")
    return kept


def _write_report(path: Path, names: list[str], settings: Any, arrivals: Any, title: str) -> None:
    from bros_ref.simulator.simulate import run
    from bros_ref.viz.figures.report import write_report

    results = [run(name, settings, arrivals, keep_steps=True) for name in names]
    write_report(path, [trace for _, trace in results], [summary for summary, _ in results], title)


@app.command()
def reproduce(out: Annotated[Path, typer.Option(callback=output_folder,
                                                help="Folder for the report and the JSON.")] = Path("out/reproduce"),
              duration_s: Annotated[float, typer.Option(help="Simulated seconds per run; the paper's is 600.")] = 600.0,
              seeds: Annotated[int, typer.Option(min=1, help=(
                  "Runs per policy and setting, seeds --seed, --seed + 1, ...; fewer than 5 decide little."))] = 5,
              minutes: Annotated[float | None, typer.Option(help=(
                  "Budget of real time: runs become as short as it demands."))] = None,
              quick: Annotated[bool, typer.Option("--quick", help="60 s per run and fewer rates.")] = False,
              parts: Annotated[str, typer.Option(help=(
                  "Comma-separated: the paper's sweep, sweeps beyond it, options of bros-plus, and traces and long "
                  "prompts on which nothing was tuned."))] = "paper,sweep,ablation,unseen",
              traces: Annotated[Path | None, typer.Option(metavar="FOLDER", help=(
                  "unseen: a folder of traces and of files of lengths, each to be served at two loads."))] = None,
              rt_lengths: RtLengthsOption = None,
              processes: ProcessesOption = 0, seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """The paper's evaluation, simulated: every figure and the ablation, our numbers beside the paper's."""
    from bros_ref.cli.tables import dominance_table, figures_table, rivals_table
    from bros_ref.evaluation.reproduce import SHORTEST_CONTEXT_TOKENS, reproduce_paper
    from bros_ref.viz.figures.reproduction import write_reproduction
    from bros_ref.workload.files import read_lengths

    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"--minutes must be a positive finite number, got {minutes}")
    console = make_console(json_path)
    with progress(console, "reproduce", 1.0) as advance:
        sharegpt = "sharegpt" if rt_lengths is None else read_lengths(rt_lengths, SHORTEST_CONTEXT_TOKENS)
        result = reproduce_paper(min(duration_s, 60.0) if quick else duration_s, seed, seeds=seeds, minutes=minutes,
                                 quick=quick, processes=processes, sharegpt=sharegpt, traces=traces,
                                 parts=[part.strip() for part in parts.split(",")], on_progress=advance)
    done = f"{result['seeds']} of {seeds} seeds" if result["seeds"] < seeds else f"{seeds} seed{'s' * (seeds > 1)}"
    basis = f"{done}, {result['duration_s']:,.0f} simulated seconds per run"
    if result["figures"]:
        console.print(figures_table(result["figures"], basis))
    if result["dominance"]:
        console.print(dominance_table(result["dominance"], basis))
    for row in result["dominance"]:
        if row["cell"].startswith("unseen/"):
            console.print(rivals_table(row))
    write_json(json_path, "reproduce", seed, **result)
    write_json(str(out / "reproduce.json"), "reproduce", seed, **result)
    write_reproduction(out / "report.html", result)
    say(console, f"report: {out / 'report.html'}")


@bench_app.command("simulator")
def bench_simulator_command(policies: Annotated[str, typer.Option()] = "vllm-fcfs,vllm-priority,bros",
                            duration_s: Annotated[float, typer.Option(help="Simulated seconds.")] = 600.0,
                            rt_rate: float = 4.0,
                            file_requests: Annotated[int, typer.Option(min=0, help=(
                                "Also a trace file of so many requests, under the last policy."))] = 0,
                            seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """What simulating costs: the paper's OPT-13B setting, CPU time of one core, peak memory."""
    from bros_ref.cli.tables import simulator_table
    from bros_ref.evaluation.bench.simulator import bench_simulator

    names = parse_policies(policies)
    console = make_console(json_path)
    with progress(console, "simulator", len(names)) as advance:
        rows = bench_simulator(names, duration_s, rt_rate, seed, file_requests, lambda: advance(1))
    console.print(simulator_table(rows))
    write_json(json_path, "bench simulator", seed, rows=rows)
