"""Results for people at a terminal: rich tables from the same dictionaries that go to JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

Run = Mapping[str, Any]


def number(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    """A figure with thousands separators; an en dash where there is no sample."""
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def results_table(runs: Sequence[Run], title: str) -> Table:
    """Both classes of every run, absolute values."""
    table = Table(title=title, title_justify="left", header_style="bold", caption=(
        "RT on time: share of all arrived real-time requests that met both targets. Preempted: by recomputation or "
        "whole swap. Slots to/from host: KV checkpointed and restored."), caption_justify="left")
    table.add_column("policy", min_width=max((len(run["policy"]) for run in runs), default=0))  # names are never cut
    for name in ("RT on time", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "BE tokens/s", "BE longest wait s",
                 "KV peak", "preempted", "recomputed tokens", "slots to/from host"):
        table.add_column(name, justify="right")
    for run in runs:
        rt, be, kv = run["classes"]["rt"], run["classes"]["be"], run["kv"]
        table.add_row(
            run["policy"], number(rt["slo_attainment"], 0, 100) + " %" if rt["slo_attainment"] is not None else "–",
            number(rt["median_ttft_ms"]), number(rt["p99_ttft_ms"]), number(rt["median_tpot_ms"], 1),
            number(be["output_throughput"], 1), number(be["max_wait_s"], 1), number(kv["peak_usage"], 0, 100) + " %",
            number(kv["preempted_requests"]), number(kv["recomputed_tokens"]),
            f"{number(kv['checkpointed_slots'])} / {number(kv['restored_slots'])}")
    return table


def serve_table(run: Run, title: str) -> Table:
    """What a client over HTTP saw of both classes."""
    added = run["http_added_ttft_ms"]
    table = Table(title=title, title_justify="left", header_style="bold", caption=(
        "Latencies count from the scheduled arrival. On time: share of all real-time requests that met both targets."
        + ("" if added is None else f" Of the mean real-time TTFT, HTTP added {added:.1f} ms.")),
        caption_justify="left")
    for name in ("class", "sent", "completed", "failed", "on time", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms",
                 "tokens/s"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for kind, values in run["classes"].items():
        attained = values["slo_attainment"]
        table.add_row(kind, number(values["arrived"]), number(values["completed"]), number(values["failed"]),
                      "–" if attained is None else number(attained, 0, 100) + " %", number(values["median_ttft_ms"]),
                      number(values["p99_ttft_ms"]), number(values["median_tpot_ms"], 1),
                      number(values["output_throughput"], 1))
    return table


def scheduler_table(rows: Sequence[Mapping[str, Any]], slopes: Mapping[str, float]) -> Table:
    """What deciding costs."""
    table = Table(title="CPU time of schedule + update, no model", title_justify="left", header_style="bold",
                  caption="slope: what one more running request adds to a step", caption_justify="left")
    for name in ("policy", "running", "waiting", "us per request-step", "us per step", "slope us"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        table.add_row(row["policy"], number(row["running"]), number(row["waiting"]),
                      number(row["us_per_request_step"], 2), number(row["us_per_step"]),
                      number(slopes.get(row["policy"]), 2))
    return table


def engine_table(result: Mapping[str, Any]) -> Table:
    """The engine against transformers, and against the machine."""
    machine = (f"decode of one sequence: {number(result['decode1_s'], 1, 1e3)} ms a token = "
               f"{number(result['decode1_over_weights_read'], 2)} x reading the weights once "
               f"({number(result['weights_read_s'], 1, 1e3)} ms); prefill of 512: "
               f"{number(result['prefill512_share_of_matrix_rate'], 0, 100)} % of the measured fp32 matrix rate "
               f"({number(result['matrix_flops_per_s'], 0, 1e-9)} GFLOP/s)")
    table = Table(title="Engine, fp32", title_justify="left", header_style="bold", caption=machine,
                  caption_justify="left")
    for name in ("case", "system", "output tokens/s", "ms per step", "x transformers", "peak RSS MB"):
        table.add_column(name, justify="left" if name in ("case", "system") else "right")
    for row in result["rows"]:
        ratio = result["speedup_over_transformers"].get(row["case"]) if row["system"] == "bros_ref" else None
        table.add_row(row["case"], row["system"], number(row["output_tok_s"], 1), number(row["ms_per_step"], 1),
                      number(ratio, 2), number(row["peak_rss_bytes"], 0, 1e-6))
    return table


INTERVAL_COLUMNS = (("rt.slo_attainment", "RT on time %", 1, 100), ("rt.median_ttft_ms", "TTFT p50 ms", 0, 1),
                    ("rt.p99_ttft_ms", "TTFT p99 ms", 0, 1), ("rt.median_tpot_ms", "TPOT p50 ms", 0, 1),
                    ("be.output_throughput", "BE tokens/s", 1, 1))


def interval_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Means with their confidence intervals, one row a policy."""
    def cell(row: Mapping[str, Any], key: str, digits: int, scale: float) -> str:
        mean, half = row[key] or (None, None)
        return number(mean, digits, scale) + ("" if half is None else f" ± {number(half, digits, scale)}")

    return _interval_table(rows, title, cell)


def median_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Medians beside the confidence intervals of the means, one row a policy."""
    def cell(row: Mapping[str, Any], key: str, digits: int, scale: float) -> str:
        bounds = row["interval95"][key]
        return number(row["median"][key], digits, scale) + ("" if bounds is None else (
            f" [{', '.join(number(bound, digits, scale) for bound in bounds)}]"))

    return _interval_table(rows, title, cell)


def _interval_table(rows: Sequence[Mapping[str, Any]], title: str,
                    cell: Callable[[Mapping[str, Any], str, int, float], str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("policy", min_width=max((len(row["policy"]) for row in rows), default=0))  # names are never cut
    for _, heading, _, _ in INTERVAL_COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["policy"], *(cell(row, key, digits, scale) for key, _, digits, scale in INTERVAL_COLUMNS))
    return table


def simulator_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What simulating costs."""
    table = Table(title="Simulator, one core", title_justify="left", header_style="bold")
    for name in ("policy", "setting", "requests", "simulated s", "CPU s", "request-steps", "request-steps per CPU s",
                 "peak RSS MB"):
        table.add_column(name, justify="left" if name in ("policy", "setting") else "right")
    for row in rows:
        table.add_row(row["policy"], f"{row['model']}, {row['gpu']}", number(row["requests"]),
                      number(row["simulated_s"]), number(row["cpu_s"], 1), number(row["request_steps"]),
                      number(row["request_steps_per_s"]), number(row["peak_rss_bytes"], 0, 1e-6))
    return table


def figures_table(figures: Sequence[Mapping[str, Any]], basis: str) -> Table:
    """The paper's numbers beside ours; `basis`: how many seeds, and how long."""
    table = Table("comparison", "metric", title=f"The paper's best cases, and ours (simulated; {basis})",
                  title_justify="left", header_style="bold", caption_justify="left",
                  caption="absolute: bros / baseline; ±: 95 % interval, at both ends of which a verdict holds")
    for name in ("paper", "ours", "absolute", "setting", "verdict"):
        table.add_column(name, justify="right" if name != "setting" else "left")
    for figure in figures:
        unit = "x" if figure["kind"] == "ratio" else "%"
        absolute = " / ".join(number(value, 3) for value in figure["absolute"].values())
        table.add_row(figure["name"], figure["metric"], f"{number(figure['paper'], 2)} {unit}",
                      f"{number(figure['ours'], 2)}{plus_minus(figure['interval95'], 2)} {unit}", absolute,
                      figure["setting"] or "–", figure["verdict"])
    return table


def dominance_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """bros-plus against the baseline that decides each cell."""
    table = Table(title="bros-plus in every cell, and its lead over the baseline that decides the verdict",
                  title_justify="left", header_style="bold", caption_justify="left", caption="±: 95 % interval")
    for name in ("cell", "verdict", "against", "RT on time %", "points", "BE tokens/s", "difference"):
        table.add_column(name, justify="left" if name in ("cell", "verdict", "against") else "right")
    for row in rows:
        bounds = row["interval95"]
        table.add_row(row["cell"], row["verdict"], row["against"], number(row["rt"], 1, 100),
                      f"{number(row['rt_gain'], 1, 100)}{plus_minus(bounds['rt_gain'], 1, 100)}", number(row["be"]),
                      f"{number(row['be_gain'])}{plus_minus(bounds['be_gain'])}")
    return table


def plus_minus(bounds: Sequence[float] | None, digits: int = 0, scale: float = 1.0) -> str:
    """Half the width of an interval [low, high]; nothing where there is none."""
    return "" if bounds is None else f" ± {number((bounds[1] - bounds[0]) / 2, digits, scale)}"
