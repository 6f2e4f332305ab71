"""The report: one HTML file that opens offline and says what happened, from traces and their summaries alone.

It decides what is shown and in which order; figures come from the other files of this folder, HTML from `page.py`.
Invariant: absolute values stand beside every ratio, and a ratio to zero is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from bros_ref.files import write_text
from bros_ref.trace import Trace
from bros_ref.viz.figures import charts, kv_blocks, page, timeline
from bros_ref.viz.figures.page import Cell

Run = dict[str, Any]
MAX_DETAILED = 3  # policies whose schedule and pool are drawn; of more: the first and the featured one
_COUNTS = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six", 7: "Seven", 8: "Eight", 9: "Nine"}
MAX_ROWS = 40  # requests in a schedule

TERMS = {
    "Real-time (RT)": "Someone waits: a request with a target for its first token (TTFT) and for the pace of the rest "
                      "(TPOT).",
    "Best-effort (BE)": "A batch job: only how much gets done counts.",
    "TTFT, TPOT": "Time to first token: first token - arrival. Time per output token: (last token - first token) / "
                  "(tokens - 1).",
    "On time": "The share of all arrived RT requests that completed and met both targets. Refused, aborted, failed and "
               "unfinished requests count as missed.",
    "Run length": "From the first arrival to the last event. Rates are per second of it; tokens count when they are "
                  "emitted.",
    "Pending": "A request that keeps its KV and sits out a step. For BROS, not being picked is all there is to "
               "preemption.",
    "Overwritten": "Slots of a pending BE request that an RT request has written over, after their content was saved "
                   "to host memory. Only these are copied back.",
    "Ratios": "Small numbers below a value compare it with the first policy of the table.",
}


@dataclass(frozen=True)
class _Column:
    """One column of a results table. `better`: +1 more is better, -1 less is, 0 neither."""

    title: str
    value: Callable[[Run], float | None]
    form: str
    better: int = 0


def _class(name: str, key: str) -> Callable[[Run], float | None]:
    return lambda run: run["classes"][name][key]


def _part(name: str, key: str, scale: float = 1.0) -> Callable[[Run], float | None]:
    return lambda run: None if run[name][key] is None else run[name][key] * scale


RT_COLUMNS = (
    _Column("on time", _class("rt", "slo_attainment"), ".1%", 1),
    _Column("TTFT met", _class("rt", "ttft_attainment"), ".1%", 1),
    _Column("TPOT met", _class("rt", "tpot_attainment"), ".1%", 1),
    _Column("TTFT median, ms", _class("rt", "median_ttft_ms"), ",.0f", -1),
    _Column("TTFT p99, ms", _class("rt", "p99_ttft_ms"), ",.0f", -1),
    _Column("TPOT median, ms", _class("rt", "median_tpot_ms"), ",.1f", -1),
    _Column("latency, ms/token", _class("rt", "normalized_latency_ms_per_token"), ",.0f", -1),
    _Column("completed", _class("rt", "completed"), ",.0f"),
)
BE_COLUMNS = (
    _Column("output tokens/s", _class("be", "output_throughput"), ",.1f", 1),
    _Column("all tokens/s", _class("be", "total_token_throughput"), ",.1f", 1),
    _Column("requests/s", _class("be", "request_throughput"), ",.3f", 1),
    _Column("mean end-to-end, ms", _class("be", "mean_e2el_ms"), ",.0f", -1),
    _Column("longest wait, s", _class("be", "max_wait_s"), ",.2f", -1),
    _Column("completed", _class("be", "completed"), ",.0f"),
)
KV_COLUMNS = (
    _Column("peak use", _part("kv", "peak_usage"), ".0%"),
    _Column("preemptions", _part("kv", "preempted_requests"), ",.0f"),
    _Column("recomputed tokens", _part("kv", "recomputed_tokens"), ",.0f"),
    _Column("overwritten slots", _part("kv", "overwritten_slots"), ",.0f"),
    _Column("restored slots", _part("kv", "restored_slots"), ",.0f"),
    _Column("to host, MB", _part("kv", "d2h_bytes", 1e-6), ",.1f"),
    _Column("to device, MB", _part("kv", "h2d_bytes", 1e-6), ",.1f"),
    _Column("decision, µs/step", _part("scheduler", "mean_us_per_step"), ",.0f"),
    _Column("of the iteration", _part("scheduler", "share_of_iteration"), ".1%"),
)


def write_report(path: Path | str, traces: Sequence[Trace], summaries: Sequence[Run], title: str,
                 samples: dict[str, str] | None = None, player: str = "") -> None:
    """Writes the report of one or several policies on the same workload; the first one is the baseline.

    Args:
        summaries: `summarise(trace)` of each trace, in the same order.
        samples: what was asked -> the answer's text, shown near the end.
        player: HTML of a player of the featured policy's trace (`featured_trace`), if there is one; shown near the top.

    Raises:
        ValueError: there is no trace, or traces and summaries do not belong together.
    """
    if not traces or [trace.policy for trace in traces] != [run["policy"] for run in summaries]:
        raise ValueError("a report needs at least one trace, and one summary for each in the same order; got traces of "
                         f"{[trace.policy for trace in traces]}, summaries of {[run['policy'] for run in summaries]}")
    featured = traces.index(featured_trace(traces))
    detailed = list(traces) if len(traces) <= MAX_DETAILED else [traces[0], traces[featured]]
    sections, links = [_terms()], {"reading": "How to read this"}
    if player:
        sections.append(_player(traces[featured], player))
        links["player"] = "Step by step"
    sections += [_results(summaries), _comparison(traces, summaries), _schedules(detailed),
                 _memory(detailed, traces[featured]), _waiting(traces), _predictions(traces)]
    links |= {"results": "Results", "trade-off": "Trade-off", "schedule": "Schedule", "memory": "Memory",
              "reasons": "Why they waited", "prediction": "Prediction"}
    if samples:
        sections.append(_answers(samples))
        links["answers"] = "Answers"
    nav = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in links.items())
    said = verdict(summaries[featured], summaries[0])
    body = (f'{_header(title, traces, said)}<nav aria-label="Sections"><ul>{nav}</ul></nav>'
            f"<main>{_cards(summaries, featured)}{''.join(sections)}</main>{_footer(traces[0])}")
    write_text(path, page.document(title, body, get_plotlyjs()))


def featured_trace(traces: Sequence[Trace]) -> Trace:
    """The policy that the page features: BROS if present, else the last."""
    return next((trace for trace in traces if trace.policy == "bros"), traces[-1])


def verdict(run: Run, base: Run) -> str:
    """What came out, in two sentences: one for each class."""
    on_time, work = RT_COLUMNS[0], BE_COLUMNS[0]

    def beside(column: _Column) -> str:
        return "" if run is base else f", against {_show(column, base)} under {base['policy']}"

    first = f"Under {run['policy']}, no real-time request arrived."
    if on_time.value(run) is not None:
        first = (f"Under {run['policy']}, {_show(on_time, run)} of the real-time requests had all their tokens in time"
                 f"{beside(on_time)}.")
    if not run["classes"]["be"]["arrived"]:
        return f"{first} There was no best-effort work."
    return f"{first} Best-effort work got {_show(work, run)} tokens per second{beside(work)}."


# -- sections ---------------------------------------------------------------------------------------------------------


def _header(title: str, traces: Sequence[Trace], said: str) -> str:
    trace = traces[0]
    num_rt = sum(record.request_class == "rt" for record in trace.requests.values())
    num_slots = trace.num_blocks * trace.block_size
    lengths = [f"{length:,.1f}" for length in sorted(trace.end_s - trace.start_s for trace in traces)]
    facts = {
        "Model": trace.model, "Device": trace.device,
        "KV pool": f"{trace.num_blocks:,} blocks × {trace.block_size} = {num_slots:,} tokens, "
                   f"{num_slots * trace.slot_bytes / 1e6:,.0f} MB",
        "Requests": f"{num_rt:,} real-time, {len(trace.requests) - num_rt:,} best-effort",
        "Run": f"{lengths[0]} s" if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]} s",
        "Seed": str(trace.seed)}
    count = "One policy" if len(traces) == 1 else f"{_COUNTS.get(len(traces), len(traces))} policies on one workload"
    lead = (f"{count}: {', '.join(trace.policy for trace in traces)}. Real-time requests need their tokens in time; "
            "best-effort requests take what is left. How much of both does one model on one device deliver?")
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return (f'<header><div><h1>{escape(title)}</h1><p class="verdict">{escape(said)}</p><p>{escape(lead)}</p>'
            f'<dl class="facts">{rows}</dl></div></header>')


def _cards(summaries: Sequence[Run], featured: int) -> str:
    """Four headline numbers of the featured policy, each beside the baseline's."""
    run, base = summaries[featured], summaries[0]
    columns = (("rt", "Real-time requests on time", RT_COLUMNS[0], ""),
               ("rt", "Real-time TTFT, p99", RT_COLUMNS[4], "ms"),
               ("be", "Best-effort output", BE_COLUMNS[0], "tokens/s"),
               ("kv", "KV tokens computed again", KV_COLUMNS[2], ""))
    cards = []
    for kind, heading, column, unit in columns:
        note = "" if run is base else f" ({base['policy']}: {_show(column, base)})"
        cards.append(page.card(kind, heading, _show(column, run), unit, run["policy"] + note))
    return f'<div class="cards">{"".join(cards)}</div>'


def _player(trace: Trace, player: str) -> str:
    return page.section(
        "player", f"Step by step under {trace.policy}", "Press play, or move the slider with the arrow keys: who runs "
        "in each iteration, who waits and why, and which slots of the KV pool they hold.",
        f'<div class="scroll" tabindex="0" role="region" aria-label="Schedule and KV pool">{player}</div>')


def _results(summaries: Sequence[Run]) -> str:
    return page.section(
        "results", "Results of both classes", "Each row is one policy. The diamond marks the best value of a column; "
        "small numbers compare with the first row.",
        _table("Real-time requests", RT_COLUMNS, summaries), _table("Best-effort requests", BE_COLUMNS, summaries),
        _table("KV cache and scheduler", KV_COLUMNS, summaries))


def _table(caption: str, columns: Sequence[_Column], summaries: Sequence[Run]) -> str:
    rows = []
    for run in summaries:
        cells = [Cell(_show(column, run), _ratio(column, run, summaries[0]), _is_best(column, run, summaries))
                 for column in columns]
        rows.append((str(run["policy"]), cells))
    return page.table(caption, ["policy", *(column.title for column in columns)], rows)


def _comparison(traces: Sequence[Trace], summaries: Sequence[Run]) -> str:
    return page.section(
        "trade-off", "The trade-off, and the latencies behind it",
        "A policy is only better if what it gives to the waiting users is not taken from the batch work.",
        page.chart("chart-trade-off", charts.trade_off(summaries), "Attainment against throughput",
                   "Look for the point that is high without being far to the left: most users served within both SLOs, "
                   "little taken from the batch work."),
        page.chart("chart-latency", charts.latency_ecdf(traces), "Latency distributions",
                   "Look at where each curve crosses the dashed SLO line: that height is the share of all arrived "
                   "requests served within it; a curve that ends below 100 % left the rest unserved."))


def _schedules(traces: Sequence[Trace]) -> str:
    end_s = max(timeline.shown_end_s(trace, MAX_ROWS) for trace in traces)
    figures = []
    for place, trace in enumerate(traces):
        num_rows = len(timeline.shown_requests(trace, MAX_ROWS))
        figures.append(page.chart(
            f"chart-schedule-{place}", timeline.schedule(trace, MAX_ROWS, end_s), f"Schedule under {trace.policy}",
            "Look at the dotted bars before the first token of each real-time row, and at who gives way to whom; "
            f"{num_rows} of {len(trace.requests)} requests are shown."))
    return page.section("schedule", "Who ran when", "One row for each request, from its arrival to its last token. All "
                        "charts here have the same time axis.", *figures)


def _memory(traces: Sequence[Trace], featured: Trace) -> str:
    end_s = max(trace.end_s for trace in traces)
    sharing = {trace.policy for trace in traces if any(step.offloaded for step in trace.steps)}
    figures = [page.chart(
        f"chart-pool-{place}", kv_blocks.pool_over_time(trace, end_s), f"KV pool under {trace.policy}",
        "Look at how full the pool is when real-time requests arrive, and at who makes room" + (
            "; below, tokens that gave up their slots and wait in host memory." if trace.policy in sharing else "."))
        for place, trace in enumerate(traces)]
    if featured.steps:
        index = kv_blocks.busiest_step(featured)
        shown = min(featured.num_blocks, kv_blocks.MAX_BLOCKS)
        figures.append(page.drawing(
            kv_blocks.block_map(featured, index),
            f"Every slot at {featured.steps[index].start_s:.2f} s under {featured.policy}",
            "Look at the blocks with two owners: real-time fills from the left, best-effort from the right; point at a "
            f"run of slots for its owner and token positions. {shown} of {featured.num_blocks} blocks are shown."))
    return page.section("memory", "Who held the memory", "The KV cache is what both classes compete for. At any moment "
                        "each block is in exactly one state.", *figures)


def _waiting(traces: Sequence[Trace]) -> str:
    return page.section(
        "reasons", "Why requests were left out of a step", "Each time a runnable request sat out an iteration, the "
        "scheduler wrote down why.",
        page.chart("chart-reasons", charts.reasons(traces), "Reasons",
                   "Look at which limit binds under each policy: memory, the size of the batch, or a deadline."))


def _predictions(traces: Sequence[Trace]) -> str:
    predicting = [trace for trace in traces if any(step.predicted_s for step in trace.steps)]
    if not predicting:
        return page.section("prediction", "Predicted against measured step time",
                            "No policy of this comparison predicts the duration of a step.")
    return page.section(
        "prediction", "Predicted against measured step time", "A policy that promises deadlines must know how long a "
        "step will take before it runs.",
        page.chart("chart-prediction", charts.predicted_steps(predicting), "Step time",
                   "Look at how far points lie above the dashed line: those steps took longer than promised."))


def _answers(samples: dict[str, str]) -> str:
    parts = "".join(f"<div><h3>{escape(asked)}</h3><blockquote>{escape(answer)}</blockquote></div>"
                    for asked, answer in samples.items())
    return page.section("answers", "What the model answered", "Some of the text that was generated during the run.",
                        f'<div class="samples">{parts}</div>')


def _terms() -> str:
    rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in TERMS.items())
    return page.section("reading", "How to read this page", "The words and the definitions behind the numbers.",
                        f'<dl class="terms">{rows}</dl>')


def _footer(trace: Trace) -> str:
    stamp = "; ".join(f"{name} {value}" for name, value in trace.environment.items() if value is not None)
    return f"<footer>Made by bros_ref from the traces of the runs. {escape(stamp)}</footer>"


# -- numbers ----------------------------------------------------------------------------------------------------------


def _show(column: _Column, run: Run) -> str:
    value = column.value(run)
    return "none" if value is None else format(value, column.form)


def _ratio(column: _Column, run: Run, base: Run) -> str:
    """ "× 1.25" beside the baseline's value; nothing for the baseline itself, or where a value is zero."""
    value, reference = column.value(run), column.value(base)
    if run is base or not reference or not value:
        return ""
    return f"× {value / reference:.2f}" if value / reference < 100 else f"× {value / reference:,.0f}"


def _is_best(column: _Column, run: Run, summaries: Sequence[Run]) -> bool:
    """Whether to mark a value as best: only where there is a direction and a difference."""
    known = {value for other in summaries if (value := column.value(other)) is not None}
    value = column.value(run)
    if column.better == 0 or len(known) < 2 or value is None:
        return False
    return value == (max(known) if column.better > 0 else min(known))
