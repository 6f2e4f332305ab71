"""`bros-ref serve` and `bros-ref bench serve`: the server, and the client that measures one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bros_ref.cli.common import (
    BackendOption,
    ChunkedOption,
    ClassOption,
    CountOption,
    DeviceOption,
    JsonOption,
    KvDtypeOption,
    ModelOption,
    RefitOption,
    SeedOption,
    SlowdownOption,
    SplitOption,
    ThreadsOption,
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
    set_threads,
    write_json,
)


@app.command()
def serve(model: ModelOption = "smollm2", policy: Annotated[str, typer.Option()] = "bros-plus",
          host: Annotated[str, typer.Option(help="Another than loopback needs --api-key-file.")] = "127.0.0.1",
          port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
          ttft_slo_s: TtftOption = 1.0, tpot_slo_s: TpotOption = 0.25,
          data_dir: Annotated[Path, typer.Option(callback=output_folder, help="Files and batches live here.")] = Path(
              "out/serve"),
          api_key_file: Annotated[Path | None, typer.Option(help="Accepted keys, one on each line.")] = None,
          max_queued_rt: CountOption = 256, max_queued_be: CountOption = 256,
          reject_late: Annotated[bool, typer.Option("--reject-late", help="Refuse at once what the latency model says "
                                                    "will miss its TTFT target.")] = False,
          kv_blocks: Annotated[int | None, typer.Option(min=1, help="Default: what fits the memory.")] = None,
          block_size: CountOption = 16, max_num_seqs: CountOption = 8,
          max_num_batched_tokens: CountOption = 256, chunked_prefill: ChunkedOption = None,
          device: DeviceOption = "auto", backend: BackendOption = "auto",
          rt_slowdown: SlowdownOption = None, kv_dtype: KvDtypeOption = "auto", tp: SplitOption = 1,
          threads: ThreadsOption = 0, refit: RefitOption = False, seed: SeedOption = 0) -> None:
    """An OpenAI-compatible server: interactive calls are real-time; flex calls and batches are best-effort."""
    from bros_ref.engine.build import LiveSettings, blocks_that_fit, load_model, make_engine, make_runner
    from bros_ref.engine.profile import fit_latency_model
    from bros_ref.request import SLO
    from bros_ref.server.run import DrainingServer, open_socket
    from bros_ref.server.settings import ServerSettings, read_api_keys
    from bros_ref.server.state import ServerState

    if "," in policy:
        raise ValueError(f"--policy takes one policy, got {policy!r}")
    [name] = parse_policies(policy)
    keys = () if api_key_file is None else read_api_keys(api_key_file)
    settings = ServerSettings(
        model_id=model, slo=SLO(ttft_slo_s, tpot_slo_s), host=host, port=port, data_dir=data_dir, api_keys=keys,
        max_queued_rt=max_queued_rt, max_queued_be=max_queued_be, batch_lines_in_flight=2 * max_num_seqs,
        reject_late=reject_late)
    listener = open_socket(host, port)
    set_threads(threads)
    loaded = load_model(model, device, seed, backend, tp)
    if kv_blocks is None:
        kv_blocks = blocks_that_fit(loaded, block_size, max_num_seqs, kv_dtype)
    live = LiveSettings(kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, chunked_prefill, seed,
                        rt_slowdown, kv_dtype)
    runner = make_runner(loaded, live)
    with progress(Console(stderr=True), "latency model", 1.0) as advance:
        done = 0.0

        def on_progress(fraction: float) -> None:
            nonlocal done
            advance(fraction - done)
            done = fraction

        latency = fit_latency_model(runner, max_num_seqs, model, refit=refit, on_progress=on_progress)
    state = ServerState(make_engine(name, loaded, runner, live, latency), loaded, settings)
    print(f"{model} on {loaded.device}, policy {name}, {kv_blocks} KV blocks of {block_size} tokens", flush=True)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    sys.setswitchinterval(0.001)  # else the event loop may wait 5 ms while the engine's thread decides
    DrainingServer(state, lambda: print(hello(url, model, bool(keys)), flush=True)).run([listener])


def hello(url: str, model: str, needs_key: bool) -> str:
    """The message of a server that is ready: its address, and three things to try."""
    key = "YOUR_KEY" if needs_key else "none"
    header = f" -H 'authorization: Bearer {key}'" if needs_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
    snippet = (f"import openai; c = openai.OpenAI(base_url='{url}/v1', api_key='{key}'); "
               f"print(c.chat.completions.create(model='{model}', max_tokens=32, "
               "messages=[{'role': 'user', 'content': 'Hello'}]).choices[0].message.content)")
    return "\n".join((f"listening on {url}",
                      f"curl {url}/v1/chat/completions{header} -H 'content-type: application/json' -d '{body}'",
                      f'python -c "{snippet}"', f"{url}/dashboard"))


@bench_app.command("serve")
def bench_serve_command(base_url: Annotated[str, typer.Option(help="http://HOST:PORT of the server to measure.")],
                        workload: Annotated[list[Path] | None, typer.Option(
                            help="Workload file; repeat to merge several. Otherwise the next four.")] = None,
                        rt_rate: Annotated[float, typer.Option(min=0.0, help="Real-time requests a second.")] = 0.5,
                        be_requests: Annotated[int, typer.Option(min=0)] = 8,
                        duration_s: Annotated[float, typer.Option(min=0.0, help="Arrivals end then.")] = 20.0,
                        be_as_batch: Annotated[bool, typer.Option(
                            "--be-as-batch", help="Best-effort requests as one batch.")] = False,
                        ttft_slo_s: TtftOption = 1.0, tpot_slo_s: TpotOption = 0.25,
                        model: Annotated[str | None, typer.Option(help="Default: the server's first.")] = None,
                        ignore_eos: Annotated[bool, typer.Option(help="Ask for outputs of full length.")] = True,
                        request_class: ClassOption = None, time_unit_s: TimeUnitOption = None,
                        report: Annotated[Path | None, typer.Option(callback=output_file,
                                                                    help="Write an HTML report here.")] = None,
                        seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """An open-loop client: both classes over HTTP against ours or any OpenAI server. The key is OPENAI_API_KEY's."""
    from bros_ref.cli.tables import serve_table
    from bros_ref.evaluation.bench import serve as bench
    from bros_ref.request import SLO, RequestClass
    from bros_ref.workload.files import read_workload
    from bros_ref.workload.generate import merge

    slo = SLO(ttft_slo_s, tpot_slo_s)
    if request_class not in (None, "rt", "be"):
        raise ValueError(f"--class must be rt or be, got {request_class!r}")
    if workload:
        kind = None if request_class is None else RequestClass(request_class)
        items = merge(*(read_workload(path, kind, slo, time_unit_s) for path in workload))
    else:
        items = bench.default_workload(rt_rate, be_requests, duration_s, slo, seed)
    if not items:
        raise ValueError("there is nothing to send; give --rt-rate, --be-requests or --workload")
    target = bench.find_target(base_url, os.environ.get("OPENAI_API_KEY", "none"), model, ignore_eos)
    with progress(Console(stderr=True), "requests", len(items)) as advance:
        run, trace = bench.bench_serve(target, items, seed, be_as_batch=be_as_batch, on_done=lambda: advance(1))
    make_console(json_path).print(serve_table(run, f"{target.model} at {target.base_url}"))
    if report is not None:
        bench.write_serve_report(report, run, trace, target.base_url)
    write_json(json_path, "bench serve", seed, runs=[run])
