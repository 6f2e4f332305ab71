"""`bros-ref bench kv-dtype`: what keys and values in fewer bits cost in accuracy."""

from __future__ import annotations

from dataclasses import asdict

from bros_ref.cli.common import (
    BackendOption,
    CountOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    bench_app,
    make_console,
    progress,
    set_threads,
    write_json,
)


@bench_app.command("kv-dtype")
def bench_kv_dtype(model: ModelOption = "smollm2", windows: CountOption = 24, window_tokens: CountOption = 512,
                   device: DeviceOption = "auto", backend: BackendOption = "auto", threads: ThreadsOption = 0,
                   json_path: JsonOption = None) -> None:
    """Perplexity with K and V in the model's dtype and in fp8."""
    from bros_ref.cli.tables import kv_dtype_table
    from bros_ref.engine.build import load_model
    from bros_ref.evaluation.bench.kv_dtype import perplexities

    console = make_console(json_path)
    set_threads(threads)
    loaded = load_model(model, device, backend=backend)
    with progress(console, "perplexity", 2 * windows) as advance:
        rows = [asdict(row) for row in perplexities(loaded, windows, window_tokens, on_window=lambda: advance(1))]
    console.print(kv_dtype_table(rows, f"{loaded.name} on {loaded.device}, {loaded.dtype}, {windows} windows of "
                                       f"{window_tokens} tokens"))
    write_json(json_path, "bench kv-dtype", 0, rows=rows, windows=windows, window_tokens=window_tokens)
