"""Every table fits 80 columns with any figures: nothing is cut, broken or lost."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bros_ref.cli import tables
from bros_ref.cli.common import TABLE_WIDTH, make_console
from bros_ref.cli.fitted import Column, FittedTable
from bros_ref.scheduler import known_policies
from bros_ref.trace import Trace
from bros_ref.trace.metrics import summarise

BIG = 1_234_567.891


def rendered(table: object, width: int = TABLE_WIDTH, encoding: str = "utf-8") -> list[str]:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding=encoding, errors="backslashreplace")
    Console(file=stream, width=width, markup=False).print(table)
    stream.flush()
    return data.getvalue().decode(encoding).splitlines()


def big(values: object, key: str = "") -> object:
    """The same, with every number as large as they get: shares are 1."""
    if isinstance(values, dict):
        return {name: big(value, name) for name, value in values.items()}
    if key.endswith(("attainment", "usage")):
        return 1.0
    return BIG if values is None or isinstance(values, int | float) else values


RUNS = [{**big(summarise(Trace(policy, "m", "cpu", 1, 1, 1, 0))), "policy": policy} for policy in known_policies()]
BOUNDS = [-BIG, BIG]
INTERVALS = [{"policy": policy, **{key: [BIG, BIG] for key, *_ in tables.INTERVAL_COLUMNS},
              "median": {key: BIG for key, *_ in tables.INTERVAL_COLUMNS},
              "interval95": {key: BOUNDS for key, *_ in tables.INTERVAL_COLUMNS}} for policy in known_policies()]
ENGINE = {"decode1_s": 1.0, "decode1_over_weights_read": 1.0, "weights_read_s": 1.0, "matrix_flops_per_s": 1e12,
          "prefill512_share_of_matrix_rate": 0.5, "speedup_over": {"transformers": {"decode-1": BIG}},
          "versions": {"transformers": "4.57.6", "llama.cpp": "2026.10.11549"}, "absent": {"vllm": "not installed"},
          "rows": [
              {"case": "decode-1", "system": system, "output_tok_s": BIG, "ms_per_step": BIG, "peak_rss_bytes": 1e13}
              for system in ("bros_ref", "transformers")]}
KERNEL = {"step": "prefill 1", "dtype": "bfloat16", "head_dim": 256, "arch": "sm_120a", "registers": 255,
          "spill_bytes": 12_345, "occupancy": 1.0, "max_error": 1e-12, "sectors_over_minimum": 1234.5,
          "warp_instructions_per_kib": 12_345.0, "main_loop_instructions_per_kib": 12_345.0,
          "direction_overhead": 1.2345, "worst_bank_conflict": 32}
TABLES = {
    "results": tables.results_table(RUNS, "a title " * 30),
    "intervals": tables.interval_table(INTERVALS, "t"),
    "medians": tables.median_table(INTERVALS, "t"),
    "scheduler": tables.scheduler_table([{"policy": policy, "running": BIG, "waiting": BIG, "us_per_step": BIG,
                                          "us_per_request_step": BIG} for policy in known_policies()], {"bros": BIG}),
    "serve": tables.serve_table({**RUNS[0], "http_added_ttft_ms": BIG}, "t"),
    "engine": tables.engine_table(ENGINE),
    "simulator": tables.simulator_table([{
        "policy": policy, "model": "llama-3-70b", "gpu": "h200-141gb", "requests": BIG, "simulated_s": BIG,
        "cpu_s": BIG, "request_steps": BIG, "request_steps_per_s": BIG, "peak_rss_bytes": 1e12}
        for policy in known_policies()]),
    "figures": tables.figures_table([{
        "name": "bros against vllm-priority-watermark", "metric": "RT latency, ms/token", "kind": "ratio", "paper": 1e3,
        "ours": 1e3, "interval95": [0.0, 1e3], "absolute": {"bros": BIG, "other": BIG}, "setting": "OPT-30B, 4 RT/s",
        "verdict": "not comparable"}], "5 seeds"),
    "dominance": tables.dominance_table([{
        "cell": "paper/llama-3-70b/12.5", "verdict": "indistinguishable", "against": "vllm-priority-watermark",
        "rt": 1.0, "rt_gain": -1.0, "be": BIG, "be_gain": -BIG, "interval95": {"rt_gain": BOUNDS, "be_gain": BOUNDS}}],
        "5 seeds"),
    "rivals": tables.rivals_table({
        "cell": "unseen/sharegpt_humanfirst_smollm2/high load", "rt": 1.0, "be": BIG, "each": [{
            "policy": policy, "verdict": "undecided", "rt": 1.0, "rt_gain": -1.0, "be": BIG, "be_gain": -BIG,
            "interval95": {"rt_gain": [-1.0, 1.0], "be_gain": BOUNDS}} for policy in known_policies()]}),
    "kernels": tables.kernels_table([KERNEL, {**KERNEL, "sectors_over_minimum": None}]),
    "kernel times": tables.kernel_times_table([{"case": "decode 64 x 4096", "system": "decode_7_tensor_cores",
                                                "us": BIG, "gb_per_s": BIG, "share_of_copy_bandwidth": 1.0}], "GPU"),
    "gpu step": tables.gpu_step_table([{"gpu": "h200-141gb", "batch": 1024, "path": "attention only",
                                        "model": "llama-3-70b", "context": 131072, "kernels": BIG, "uploads": BIG,
                                        "waits": BIG, "allocations": BIG, "estimated_ms": 1e5, "roofline_ms": 1e5}]),
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", TABLES)
def test_every_table_fits_with_the_longest_figures(name: str, encoding: str) -> None:
    table = TABLES[name]
    lines = rendered(table, encoding=encoding)
    assert max(map(len, lines)) <= TABLE_WIDTH + (12 if encoding == "ascii" else 0), "an escape is longer than its sign"
    assert not any("…" in line for line in lines)
    text = "\n".join(lines)
    for place, column in enumerate(table.columns):
        assert all(word in text for word in column.heading.split())
        for row in table.rows:
            cell = row[place].encode(encoding, "backslashreplace").decode(encoding)
            assert cell in text or column.is_prose


figures = st.from_regex(r"[0-9]{1,12}|[0-9]{1,3}(,[0-9]{3}){1,3}", fullmatch=True)


@settings(max_examples=60)
@given(st.integers(1, 14), st.integers(0, 3), st.integers(30, 200), st.data())
def test_each_figure_stands_whole_in_its_row_under_its_heading(num_figures: int, num_rows: int, width: int,
                                                               data: st.DataObject) -> None:
    table = FittedTable("t", [Column("key", is_text=True), *(Column(f"figure {i}") for i in range(num_figures)),
                              Column("why", is_prose=True)])
    for row in range(num_rows):
        table.add_row(f"row{row}", *data.draw(st.lists(figures, min_size=num_figures, max_size=num_figures)),
                      "some words " * 9)
    parts = table.parts(width)
    assert [place for part in parts for place in part[1:]] == list(range(1, num_figures + 2)), "each column once"
    lines = rendered(table, width)
    assert max(map(len, lines)) <= width
    for index, row in enumerate(table.rows):
        shown = [line.split() for line in lines if line.split()[:1] == [f"row{index}"]]
        assert len(shown) == len(parts)
        assert [cell for cells in shown for cell in cells[1:]][:num_figures] == row[1:-1]
    assert " ".join(lines).count("words") == 9 * num_rows


def test_a_wide_terminal_has_one_part_and_a_row_needs_all_cells() -> None:
    table = TABLES["results"]
    assert len(table.parts(200)) == 1
    assert len(tables.results_table([summarise(Trace("vllm-priority", "m", "cpu", 1, 1, 1, 0))], "t").parts(80)) == 2
    with pytest.raises(ValueError, match="a row needs 12 cells, got 1"):
        table.add_row("bros")


def test_what_is_no_terminal_is_80_columns_wide() -> None:
    assert make_console(None).width == make_console("-").width == 80
