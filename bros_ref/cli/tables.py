"""Results for people at a terminal: tables of the JSON results that fit 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bros_ref.cli.fitted import Column, FittedTable

Run = Mapping[str, Any]


def number(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    """A figure with thousands separators; an en dash where there is no sample."""
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def results_table(runs: Sequence[Run], title: str) -> FittedTable:
    """Both classes of every run, absolute values."""
    table = FittedTable(title, _columns("policy", figures=(
        "RT on time", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "BE tokens/s", "BE longest wait s", "KV peak",
        "preempted", "recomputed tokens", "slots to host", "slots from host")), caption=(
        "RT on time: share of all arrived real-time requests that met both targets. Preempted: by recomputation or "
        "whole swap. Slots to and from host: KV checkpointed and restored."))
    for run in runs:
        rt, be, kv = run["classes"]["rt"], run["classes"]["be"], run["kv"]
        table.add_row(
            run["policy"], number(rt["slo_attainment"], 0, 100) + " %" if rt["slo_attainment"] is not None else "–",
            number(rt["median_ttft_ms"]), number(rt["p99_ttft_ms"]), number(rt["median_tpot_ms"], 1),
            number(be["output_throughput"], 1), number(be["max_wait_s"], 1), number(kv["peak_usage"], 0, 100) + " %",
            number(kv["preempted_requests"]), number(kv["recomputed_tokens"]), number(kv["checkpointed_slots"]),
            number(kv["restored_slots"]))
    return table


def serve_table(run: Run, title: str) -> FittedTable:
    """What a client over HTTP saw of both classes."""
    added = run["http_added_ttft_ms"]
    table = FittedTable(title, _columns("class", figures=(
        "sent", "completed", "failed", "on time", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "tokens/s")), caption=(
        "Latencies count from the scheduled arrival. On time: share of all real-time requests that met both targets."
        + ("" if added is None else f" HTTP added {added:.1f} ms to the TTFT of a real-time request (median).")))
    for kind, values in run["classes"].items():
        attained = values["slo_attainment"]
        table.add_row(kind, number(values["arrived"]), number(values["completed"]), number(values["failed"]),
                      "–" if attained is None else number(attained, 0, 100) + " %", number(values["median_ttft_ms"]),
                      number(values["p99_ttft_ms"]), number(values["median_tpot_ms"], 1),
                      number(values["output_throughput"], 1))
    return table


def scheduler_table(rows: Sequence[Mapping[str, Any]], slopes: Mapping[str, float]) -> FittedTable:
    """What deciding costs."""
    table = FittedTable("CPU time of schedule + update, no model", _columns("policy", figures=(
        "running", "waiting", "us per request-step", "us per step", "slope us")),
        caption="slope: what one more running request adds to a step")
    for row in rows:
        table.add_row(row["policy"], number(row["running"]), number(row["waiting"]),
                      number(row["us_per_request_step"], 2), number(row["us_per_step"]),
                      number(slopes.get(row["policy"]), 2))
    return table


def engine_table(result: Mapping[str, Any]) -> FittedTable:
    """The engine against its peers, and against the machine. A peer that could not be measured has a row that says
    so."""
    machine = (f"decode of one sequence: {number(result['decode1_s'], 1, 1e3)} ms per token = "
               f"{number(result['decode1_over_weights_read'], 2)} x reading the weights once "
               f"({number(result['weights_read_s'], 1, 1e3)} ms); prefill of 512: "
               f"{number(result['prefill512_share_of_matrix_rate'], 0, 100)} % of the measured fp32 matrix rate "
               f"({number(result['matrix_flops_per_s'], 0, 1e-9)} GFLOP/s)")
    peers = [f"{name} {version}" for name, version in result["versions"].items()]
    table = FittedTable("Engine, fp32", _columns("case", "system", figures=(
        "output tokens/s", "ms per step", "bros_ref is x times as fast", "peak RSS MB")),
        caption="; ".join([machine, *peers]), num_keys=2)
    for row in result["rows"]:
        ratio = result["speedup_over"].get(row["system"], {}).get(row["case"])
        table.add_row(row["case"], row["system"], number(row["output_tok_s"], 1), number(row["ms_per_step"], 1),
                      number(ratio, 2), number(row["peak_rss_bytes"], 0, 1e-6))
    for name, reason in result["absent"].items():
        table.add_row("all", name, reason, *[number(None)] * 3)
    return table


INTERVAL_COLUMNS = (("rt.slo_attainment", "RT on time %", 1, 100), ("rt.median_ttft_ms", "TTFT p50 ms", 0, 1),
                    ("rt.p99_ttft_ms", "TTFT p99 ms", 0, 1), ("rt.median_tpot_ms", "TPOT p50 ms", 0, 1),
                    ("be.output_throughput", "BE tokens/s", 1, 1))


def interval_table(rows: Sequence[Mapping[str, Any]], title: str) -> FittedTable:
    """Means with their confidence intervals, one row per policy."""
    def cell(row: Mapping[str, Any], key: str, digits: int, scale: float) -> str:
        mean, half = row[key] or (None, None)
        return number(mean, digits, scale) + ("" if half is None else f" ± {number(half, digits, scale)}")

    return _interval_table(rows, title, cell)


def median_table(rows: Sequence[Mapping[str, Any]], title: str) -> FittedTable:
    """Medians beside the confidence intervals of the means, one row per policy."""
    def cell(row: Mapping[str, Any], key: str, digits: int, scale: float) -> str:
        bounds = row["interval95"][key]
        return number(row["median"][key], digits, scale) + ("" if bounds is None else (
            f" [{', '.join(number(bound, digits, scale) for bound in bounds)}]"))

    return _interval_table(rows, title, cell)


def _interval_table(rows: Sequence[Mapping[str, Any]], title: str,
                    cell: Callable[[Mapping[str, Any], str, int, float], str]) -> FittedTable:
    table = FittedTable(title, _columns("policy", figures=[heading for _, heading, _, _ in INTERVAL_COLUMNS]))
    for row in rows:
        table.add_row(row["policy"], *(cell(row, key, digits, scale) for key, _, digits, scale in INTERVAL_COLUMNS))
    return table


def simulator_table(rows: Sequence[Mapping[str, Any]]) -> FittedTable:
    """What simulating costs."""
    table = FittedTable("Simulator, one core", _columns("policy", "setting", figures=(
        "requests", "simulated s", "CPU s", "request-steps", "request-steps per CPU s", "peak RSS MB")), num_keys=2)
    for row in rows:
        table.add_row(row["policy"], f"{row['model']}, {row['gpu']}", number(row["requests"]),
                      number(row["simulated_s"]), number(row["cpu_s"], 1), number(row["request_steps"]),
                      number(row["request_steps_per_s"]), number(row["peak_rss_bytes"], 0, 1e-6))
    return table


def figures_table(figures: Sequence[Mapping[str, Any]], basis: str) -> FittedTable:
    """The paper's numbers beside ours; `basis`: how many seeds, and how long."""
    columns = [Column("comparison", is_prose=True), Column("metric", is_prose=True),
               *_columns(figures=("paper", "ours", "absolute")), Column("setting", is_prose=True),
               Column("verdict", is_text=True)]
    table = FittedTable(f"The paper's best cases, and ours (simulated; {basis})", columns, num_keys=2, caption=(
        "absolute: bros / baseline; ±: 95 % interval, at both ends of which a verdict holds"))
    for figure in figures:
        unit = "x" if figure["kind"] == "ratio" else "%"
        absolute = " / ".join(number(value, 3) for value in figure["absolute"].values())
        table.add_row(figure["name"], figure["metric"], f"{number(figure['paper'], 2)} {unit}",
                      f"{number(figure['ours'], 2)}{plus_minus(figure['interval95'], 2)} {unit}", absolute,
                      figure["setting"] or "–", figure["verdict"])
    return table


def dominance_table(rows: Sequence[Mapping[str, Any]], basis: str) -> FittedTable:
    """bros-plus against the baseline that decides each cell; `basis`: how many seeds, and how long."""
    title = f"bros-plus in every cell, and its lead over the baseline that decides the verdict ({basis})"
    table = FittedTable(title, _columns(
        "cell", "verdict", "against", figures=("RT on time %", "points", "BE tokens/s", "difference")),
        caption="±: 95 % interval")
    for row in rows:
        bounds = row["interval95"]
        table.add_row(row["cell"], row["verdict"], row["against"], number(row["rt"], 1, 100),
                      f"{number(row['rt_gain'], 1, 100)}{plus_minus(bounds['rt_gain'], 1, 100)}", number(row["be"]),
                      f"{number(row['be_gain'])}{plus_minus(bounds['be_gain'])}")
    return table


def rivals_table(row: Mapping[str, Any]) -> FittedTable:
    """bros-plus beside every other policy in one cell of `dominance`, those with most RT on time first."""
    title = row["cell"].partition("/")[2].replace("/", ", ")
    table = FittedTable(f"{title}: every policy, and the lead of bros-plus", [*_columns("policy", figures=(
        "RT on time %", "points", "BE tokens/s", "difference")), Column("verdict", is_text=True)], caption=(
        "±: 95 % interval of the paired difference"))
    table.add_row("bros-plus", number(row["rt"], 1, 100), "", number(row["be"]), "", "")
    for other in sorted(row["each"], key=lambda other: -other["rt"]):
        bounds = other["interval95"]
        table.add_row(other["policy"], number(other["rt"], 1, 100),
                      f"{number(other['rt_gain'], 1, 100)}{plus_minus(bounds['rt_gain'], 1, 100)}",
                      number(other["be"]), f"{number(other['be_gain'])}{plus_minus(bounds['be_gain'])}",
                      other["verdict"])
    return table


def kernels_table(rows: Sequence[Mapping[str, Any]]) -> FittedTable:
    """The results for each kernel without running it on a GPU."""
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    table = FittedTable("CUDA kernels, compiled, emulated, their PTX executed; nothing here was timed", [
        Column("step", is_text=True), Column("dtype", is_text=True), Column("D"), Column("arch", is_text=True),
        *_columns(figures=("registers", "spills", "occupancy", "max error", "sectors / min", "instr / KiB", "loop",
                           "direction", "bank"))], num_keys=4)
    for row in rows:
        table.add_row(row["step"], row["dtype"], str(row["head_dim"]), row["arch"], str(row["registers"]),
                      str(row["spill_bytes"]), f"{row['occupancy']:.0%}", f"{row['max_error']:.1e}",
                      shown(row["sectors_over_minimum"], ".2f"), shown(row["warp_instructions_per_kib"], ".0f"),
                      shown(row["main_loop_instructions_per_kib"], ".0f"), shown(row["direction_overhead"], "+.1%"),
                      shown(row["worst_bank_conflict"], "d"))
    return table


def kernel_times_table(rows: Sequence[Mapping[str, Any]], gpu: str) -> FittedTable:
    """What a GPU measured."""
    table = FittedTable(gpu, _columns("case", "system", figures=("us", "GB/s", "of copy bandwidth")), num_keys=2)
    for row in rows:
        table.add_row(row["case"], row["system"], f"{row['us']:.1f}", f"{row['gb_per_s']:.0f}",
                      f"{row['share_of_copy_bandwidth']:.0%}")
    return table


def gpu_step_table(rows: Sequence[Mapping[str, Any]]) -> FittedTable:
    """A decode step: what was counted, and an estimate of its time."""
    table = FittedTable(f"{rows[0]['model']}, {number(rows[0]['context'])} tokens of context: counted, and times "
                        "estimated; nothing here was timed",
                        _columns("GPU", "batch", "path", figures=("kernels", "uploads", "waits", "allocations",
                                                                  "estimated ms", "roofline ms")), num_keys=3)
    for row in rows:
        table.add_row(row["gpu"], number(row["batch"]), row["path"],
                      *(number(row[name]) for name in ("kernels", "uploads", "waits", "allocations")),
                      number(row["estimated_ms"], 1), number(row["roofline_ms"], 1))
    return table


def _columns(*texts: str, figures: Sequence[str]) -> list[Column]:
    return [*(Column(heading, is_text=True) for heading in texts), *map(Column, figures)]


def plus_minus(bounds: Sequence[float] | None, digits: int = 0, scale: float = 1.0) -> str:
    """Half the width of an interval [low, high]; nothing where there is none."""
    return "" if bounds is None else f" ± {number((bounds[1] - bounds[0]) / 2, digits, scale)}"


def kv_dtype_table(rows: Sequence[Mapping[str, Any]], title: str) -> FittedTable:
    """What a KV cache in fewer bits costs in accuracy."""
    table = FittedTable(title, _columns("K and V", figures=("bytes per token", "perplexity", "higher by")), caption=(
        "Text: the reference of the Python language. Higher by: mean and 95 % interval over paired windows."))
    for row in rows:
        excess = row["excess_percent"]
        table.add_row(row["kv_dtype"], number(row["bytes_per_token"]), number(row["perplexity"], 3),
                      "–" if excess is None else f"{excess[0]:+.2f} ± {number(excess[1], 2)} %")
    return table
