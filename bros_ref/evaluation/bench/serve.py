"""An open-loop client for a server that speaks OpenAI's protocol, ours or another: both classes in one run.

Every request is sent at its scheduled time whether or not earlier ones were answered, and its latency counts from that
time, so a client that falls behind does not hide what users would have waited (coordinated omission). Class and targets
travel as `service_tier` and as the headers `x-slo-ttft-ms` and `x-slo-tpot-ms`, which other servers ignore.

A chunk's arrival is the time of its tokens. Tokens are counted by the server's `usage`; where a chunk held several
they share its time. What comes out is a `Trace` of what the client saw, so every definition is that of
`trace/metrics.py`. Best-effort requests may instead be sent as one batch, whose lines have no times of their own.

A server of ours also gives the trace of its engine, with the TTFT of each request as the engine measured it. How much
later the client saw the same token is what HTTP added on both ends; it depends less on other load on the machine than
the difference of two runs would.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from bros_ref.files import write_text
from bros_ref.request import SLO, RequestClass
from bros_ref.trace.metrics import request_timings, summarise
from bros_ref.trace.records import RequestRecord, StepRecord
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import WorkloadItem, merge, open_loop, poisson_arrivals, uniform_lengths

RT_LENGTHS, BE_LENGTHS = (64, 32), (512, 128)  # prompt and output tokens, those of `bench hybrid`
PROMPT_IDS = (3, 250)  # token ids that every vocabulary has
WARM_UP_LENGTHS = (8, 2)  # prompt and output tokens
BATCH_POLL_S = 0.2
TIMEOUT_S = 3600.0
LONGEST_TRACE_S = 3600.0  # that our server gives


class BenchError(ValueError):
    """The server cannot be measured; the message says what it answered."""


@dataclass
class Answer:
    """What the client saw of one request; times in seconds since the run began."""

    request_id: str
    item: WorkloadItem
    chunk_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    response_id: str = ""  # the server's name of it
    error: str | None = None
    ended_s: float = 0.0


@dataclass(frozen=True)
class Target:
    """Where requests go. `ignore_eos` asks for outputs of full length (vLLM's field; OpenAI's own service refuses it).
    """

    base_url: str
    api_key: str
    model: str
    ignore_eos: bool = True

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"}


def default_workload(rt_rate: float, be_requests: int, duration_s: float, slo: SLO, seed: int) -> list[WorkloadItem]:
    """Poisson real-time requests at `rt_rate` per second (0: none), and `be_requests` best-effort ones at the start."""
    rng = np.random.default_rng(seed)
    (rt_in, rt_out), (be_in, be_out) = RT_LENGTHS, BE_LENGTHS
    arrivals = poisson_arrivals(rt_rate, duration_s, rng) if rt_rate > 0 else []
    return merge(
        open_loop(arrivals, RequestClass.REAL_TIME, uniform_lengths(rt_in, rt_in), uniform_lengths(rt_out, rt_out), rng,
                  slo),
        open_loop([0.0] * be_requests, RequestClass.BEST_EFFORT, uniform_lengths(be_in, be_in),
                  uniform_lengths(be_out, be_out), rng))


def find_target(base_url: str, api_key: str, model: str | None, ignore_eos: bool) -> Target:
    """Asks the server for its model unless one is named.

    Raises:
        BenchError: it cannot be reached, or does not answer as OpenAI's would.
    """
    url = base_url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {api_key}"}, timeout=30)
        answer.raise_for_status()
        return Target(url, api_key, model or answer.json()["data"][0]["id"], ignore_eos)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise BenchError(f"{url}/v1/models does not answer as an OpenAI server: {error}; is --base-url right?"
                         ) from None


def bench_serve(target: Target, items: Sequence[WorkloadItem], seed: int, *, be_as_batch: bool = False,
                on_done: Callable[[], None] | None = None) -> tuple[dict[str, Any], Trace]:
    """Sends the workload, after one short warm-up request that is not counted.
    Returns one element of "runs", and the trace of what the client saw."""
    batch = [item for item in items if be_as_batch and item.slo is None]
    singles = [item for item in items if not (be_as_batch and item.slo is None)]
    asyncio.run(_send_all(target, [_warm_up(items)], [], seed, lambda: None))
    start_s = time.perf_counter()
    answers, batch_result = asyncio.run(_send_all(target, singles, batch, seed, on_done or (lambda: None)))
    added = _http_added(target, answers, math.ceil(time.perf_counter() - start_s) + 1)
    trace = as_trace(answers, target.model, seed)
    run = {name: value for name, value in summarise(trace).items() if name not in ("kv", "scheduler", "prediction")}
    errors = sorted({answer.error for answer in answers if answer.error})
    if batch_result is not None:
        run["classes"]["be"] |= batch_result
    return run | {"errors": errors[:10], "sent_as_batch": len(batch), **added}, trace


def _warm_up(items: Sequence[WorkloadItem]) -> WorkloadItem:
    """A short request with the targets of the first real-time one: BROS learns from every request which TTFT target is
    typical."""
    slo = next((item.slo for item in items if item.slo is not None), None)
    return WorkloadItem(0.0, RequestClass.BEST_EFFORT if slo is None else RequestClass.REAL_TIME, *WARM_UP_LENGTHS, slo)


def _http_added(target: Target, answers: Sequence[Answer], seconds: float) -> dict[str, float | None]:
    """Medians over the real-time requests: TTFT in the server's engine, and how much later the client saw the token.
    None where the server gives no trace of its engine, as only ours does."""
    try:
        page = httpx.get(f"{target.base_url}/v1/trace", params={"seconds": min(seconds, LONGEST_TRACE_S)},
                         headers=target.headers, timeout=60)
        page.raise_for_status()
        with TemporaryDirectory() as folder:
            (path := Path(folder) / "trace.json").write_bytes(page.content)
            engine = request_timings(Trace.load(path))
    except (httpx.HTTPError, ValueError):
        engine = {}
    pairs = [(timing.ttft_s, answer.chunk_times_s[0] - answer.item.arrival_s) for answer in answers
             if answer.item.slo is not None and answer.chunk_times_s
             and (timing := engine.get(engine_id(answer.response_id))) is not None and timing.ttft_s is not None]
    if not pairs:
        return {"engine_median_ttft_ms": None, "http_added_ttft_ms": None}
    return {"engine_median_ttft_ms": 1e3 * median(inside for inside, _ in pairs),
            "http_added_ttft_ms": 1e3 * median(outside - inside for inside, outside in pairs)}


def engine_id(response_id: str) -> str:
    """What our server's engine calls the first choice of an answer."""
    return f"{response_id.partition('-')[2][:12]}-0"


def request_body(target: Target, item: WorkloadItem, index: int, seed: int) -> dict[str, Any]:
    """A streaming completion of the item's lengths: its text, or random token ids."""
    rng = np.random.default_rng([seed, index])
    prompt = item.prompt if item.prompt is not None else rng.integers(*PROMPT_IDS, item.prompt_tokens).tolist()
    body = {"model": target.model, "prompt": prompt, "max_tokens": item.output_tokens, "temperature": 0}
    return body | ({"ignore_eos": True} if target.ignore_eos else {})


async def _send_all(target: Target, singles: Sequence[WorkloadItem], batch: Sequence[WorkloadItem], seed: int,
                    on_done: Callable[[], None]) -> tuple[list[Answer], dict[str, Any] | None]:
    answers = [Answer(f"{item.request_class.value}-{index}", item) for index, item in enumerate(singles)]
    bodies = [request_body(target, item, index, seed) for index, item in enumerate(singles)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=target.headers, timeout=TIMEOUT_S, limits=limits) as client:
        start_s = time.perf_counter()
        batch_run = asyncio.create_task(_send_batch(client, target, batch, seed)) if batch else None

        async def one(answer: Answer, body: dict[str, Any]) -> None:
            await asyncio.sleep(max(0.0, answer.item.arrival_s - (time.perf_counter() - start_s)))
            try:
                await _stream(client, target, answer, body, start_s)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                answer.error = f"{type(error).__name__}: {error}"
            answer.ended_s = time.perf_counter() - start_s
            on_done()

        await asyncio.gather(*map(one, answers, bodies))
        return answers, None if batch_run is None else await batch_run


async def _stream(client: httpx.AsyncClient, target: Target, answer: Answer, body: dict[str, Any], start_s: float
                  ) -> None:
    slo = answer.item.slo
    headers = {} if slo is None else {"x-slo-ttft-ms": str(1e3 * slo.ttft_s), "x-slo-tpot-ms": str(1e3 * slo.tpot_s)}
    body = body | {"stream": True, "stream_options": {"include_usage": True},
                   "service_tier": "flex" if slo is None else "default"}
    async with client.stream("POST", f"{target.base_url}/v1/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            answer.error = f"HTTP {response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            answer.response_id = chunk.get("id", "")
            if "error" in chunk:
                answer.error = str(chunk["error"].get("message"))
                return
            for choice in chunk["choices"]:
                if choice.get("text") or choice.get("finish_reason") is None:  # a token may have no text of its own
                    answer.chunk_times_s.append(time.perf_counter() - start_s)
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            if chunk.get("usage"):
                answer.num_tokens = chunk["usage"]["completion_tokens"]


async def _send_batch(client: httpx.AsyncClient, target: Target, items: Sequence[WorkloadItem], seed: int
                      ) -> dict[str, Any]:
    """Sends all best-effort items as one batch; returns what is known about them as a class."""
    lines = [json.dumps({"custom_id": str(index), "method": "POST", "url": "/v1/completions",
                         "body": request_body(target, item, 1_000_000 + index, seed)})
             for index, item in enumerate(items)]
    url, start_s = f"{target.base_url}/v1", time.perf_counter()

    async def call(method: str, path: str, **content: Any) -> dict[str, Any]:
        answer = await client.request(method, f"{url}{path}", **content)
        if answer.status_code != 200:
            raise BenchError(f"{path}: HTTP {answer.status_code}: {answer.text[:200]}")
        result: dict[str, Any] = answer.json()
        return result

    file = await call("POST", "/files", data={"purpose": "batch"}, files={"file": ("be.jsonl", "\n".join(lines))})
    batch = await call("POST", "/batches", json={"input_file_id": file["id"], "endpoint": "/v1/completions",
                                                 "completion_window": "24h"})
    while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
        await asyncio.sleep(BATCH_POLL_S)
        batch = await call("GET", f"/batches/{batch['id']}")
    took_s = time.perf_counter() - start_s
    usages = []
    if batch["output_file_id"]:
        output = await client.get(f"{url}/files/{batch['output_file_id']}/content")
        usages = [json.loads(line)["response"]["body"]["usage"] for line in output.text.splitlines()]
    tokens = sum(usage["completion_tokens"] for usage in usages)
    prompts = sum(usage["prompt_tokens"] for usage in usages)
    return {"arrived": len(items), "completed": len(usages), "failed": len(items) - len(usages),
            "output_tokens": tokens, "batch_duration_s": took_s, "request_throughput": len(usages) / took_s,
            "output_throughput": tokens / took_s, "total_token_throughput": (prompts + tokens) / took_s}


def as_trace(answers: Sequence[Answer], model: str, seed: int) -> Trace:
    """What the client saw, as a trace of one step for each moment at which tokens came. It has no pool."""
    trace = Trace("http", model, "http", 1, 1, 1, seed)
    moments: list[tuple[float, str, int, str | None]] = []  # time, request, tokens, why it ended
    for answer in answers:
        item, name = answer.item, answer.request_id
        slo = item.slo
        trace.requests[name] = RequestRecord(name, item.request_class.value, item.arrival_s, item.prompt_tokens,
                                             item.output_tokens, None if slo is None else slo.ttft_s,
                                             None if slo is None else slo.tpot_s)
        times = answer.chunk_times_s or ([answer.ended_s] if answer.num_tokens else [])
        moments += [(time_s, name, 1, None) for time_s in times[:-1]]
        if times:
            moments.append((times[-1], name, max(1, answer.num_tokens - len(times) + 1), None))
        if answer.error is not None and not times:
            trace.rejected[name] = answer.error
        else:
            reason = answer.finish_reason if answer.error is None else None
            moments.append((answer.ended_s, name, 0, reason if reason in ("stop", "length") else "failed"))
    for index, (time_s, name, tokens, ended) in enumerate(sorted(moments, key=lambda moment: moment[0]), start=1):
        trace.append(StepRecord(
            step=index, start_s=time_s, duration_s=0.0, schedule_s=0.0, predicted_s=None, step_budget_s=None,
            binding=None, scheduled={name: max(1, tokens)}, emitted=[name] * tokens,
            finished={} if ended is None else {name: ended}, preempted={}, slack_s={}, left_out={}, num_behind=0,
            block_changes=[], offloaded=[], copied={"checkpoint": 0, "restore": 0, "relocate": 0},
            recomputed_tokens=0, num_waiting=0, num_running=0, used_blocks=0))
    return trace


def write_serve_report(path: Path, run: dict[str, Any], trace: Trace, base_url: str) -> None:
    """An HTML page with the figures of both classes and the distribution of latencies; opens offline."""
    from plotly.offline import get_plotlyjs

    from bros_ref.viz.figures import page
    from bros_ref.viz.figures.charts import latency_ecdf

    names = sorted({name for values in run["classes"].values() for name in values})
    rows = [(name, [page.Cell(_shown(run["classes"][kind].get(name))) for kind in ("rt", "be")]) for name in names]
    parts = [page.section("results", "Results", f"What a client of {base_url} saw; latencies count from the scheduled "
                          "arrival.", page.table("Both classes", ["", "real-time", "best-effort"], rows))]
    if any(trace.steps):
        parts.append(page.section("latency", "Latency", "The share of requests within a latency.", page.chart(
            "ecdf", latency_ecdf([trace]), "Latency", "Requests that failed never reach the curve's end.")))
    body = f"<header><div><h1>Serving over HTTP</h1></div></header><main>{''.join(parts)}</main>"
    write_text(path, page.document("Serving over HTTP", body, get_plotlyjs()))


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
