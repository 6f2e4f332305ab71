"""`bros-ref serve` and `bros-ref bench serve`: the server, and the client that measures one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bros_ref.cli.common import (
    BackendOption,
    ChunkedOption,
    CountOption,
    DeviceOption,
    ModelOption,
    RefitOption,
    SeedOption,
    ThreadsOption,
    TpotOption,
    TtftOption,
    app,
    output_folder,
    parse_policies,
    progress,
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
          kv_blocks: CountOption = 512, block_size: CountOption = 16, max_num_seqs: CountOption = 8,
          max_num_batched_tokens: CountOption = 256, chunked_prefill: ChunkedOption = None,
          device: DeviceOption = "auto", backend: BackendOption = "auto", threads: ThreadsOption = 0,
          refit: RefitOption = False, seed: SeedOption = 0) -> None:
    """An OpenAI-compatible server: interactive calls are real-time; flex calls and batches are best-effort."""
    try:
        from bros_ref.server.run import DrainingServer, open_socket
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; install the server's packages: pip install 'bros-ref[server]'"
                         ) from None
    import torch
    from rich.console import Console

    from bros_ref.engine.build import LiveSettings, load_model, make_engine, make_runner
    from bros_ref.engine.profile import fit_latency_model
    from bros_ref.request import SLO
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
    if threads:
        torch.set_num_threads(threads)
    live = LiveSettings(kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, chunked_prefill, seed)
    loaded = load_model(model, device, seed, backend)
    runner = make_runner(loaded, live)
    with progress(Console(stderr=True), "latency model", 1.0) as advance:
        done = 0.0

        def on_progress(fraction: float) -> None:
            nonlocal done
            advance(fraction - done)
            done = fraction

        latency = fit_latency_model(runner, max_num_seqs, model, refit=refit, on_progress=on_progress)
    state = ServerState(make_engine(name, loaded, runner, live, latency), loaded, settings)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    DrainingServer(state, lambda: print(hello(url, model, bool(keys)), flush=True)).run([listener])


def hello(url: str, model: str, needs_key: bool) -> str:
    """What the server says when it is ready: its address, and three things to try."""
    key = "YOUR_KEY" if needs_key else "none"
    header = f" -H 'authorization: Bearer {key}'" if needs_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
    snippet = (f"import openai; c = openai.OpenAI(base_url='{url}/v1', api_key='{key}'); "
               f"print(c.chat.completions.create(model='{model}', max_tokens=32, "
               "messages=[{'role': 'user', 'content': 'Hello'}]).choices[0].message.content)")
    return "\n".join((f"listening on {url}",
                      f"curl {url}/v1/chat/completions{header} -H 'content-type: application/json' -d '{body}'",
                      f'python -c "{snippet}"', f"{url}/dashboard"))
