"""The server's numbers for Prometheus, in a registry of its own. Its memory does not grow with requests.

Everything is counted where it happens: latencies and steps in the engine's thread, HTTP in the event loop. The state
of the KV pool is read when the page is requested.
"""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.request import Request
from bros_ref.trace.records import StepRecord

LATENCY_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300)
GAP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 30)
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4)
BLOCK_STATES = ("empty", "rt_only", "be_only", "shared")
LINE_STATES = ("waiting", "completed", "failed")
SLOT_EVENTS = {"checkpoint": "checkpointed", "restore": "restored", "relocate": "relocated"}


class Metrics:
    """All metrics. Names begin with `bros_`; the label `class` is rt or be."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ("class",)
                      ) -> Histogram:
            return Histogram(f"bros_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"bros_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"bros_{name}", text, labels, registry=registry)

        self._ttft = histogram("ttft_seconds", "Time to first token, from arrival.", LATENCY_S)
        self._tpot = histogram("tpot_seconds", "Mean time per output token after the first.", GAP_S)
        self._itl = histogram("inter_token_seconds", "Gaps between tokens.", GAP_S)
        self._e2el = histogram("end_to_end_seconds", "From arrival to the last token.", LATENCY_S)
        self._queued = histogram("queue_seconds", "From arrival to the first step that ran it.", LATENCY_S)
        self._step = histogram("step_seconds", "Duration of an engine step.", GAP_S, ())
        self._predicted = histogram("step_predicted_over_measured", "How the latency model did.", RATIOS, ())
        self._ended = counter("requests", "Requests that ended.", "class", "outcome")
        self._targets = counter("slo", "Real-time requests that met or missed a target.", "target", "met")
        self._tokens = counter("generated_tokens", "Tokens generated.", "class")
        self._slots = counter("kv_slots", "KV slots moved.", "event")
        self._recomputed = counter("recomputed_tokens", "Tokens computed again after a preemption.")
        self._http = counter("http_requests", "HTTP answers.", "route", "status")
        self._requests = gauge("requests_now", "Requests in the engine.", "class", "state")
        self._blocks = gauge("kv_blocks", "KV blocks.", "state")
        self._lines = gauge("batch_lines", "Lines of the batches that have not ended.", "state")
        self._totals = Tally[str]()  # what the dashboard shows, as plain numbers

    # -- in the engine's thread ---------------------------------------------------------------------------------

    def token(self, request: Request, gap_s: float | None) -> None:
        """A token came, `gap_s` after the one before; None for the first."""
        name = _class(request)
        self._tokens.labels(name).inc()
        self._totals[f"{name}_tokens"] += 1
        if gap_s is not None:
            self._itl.labels(name).observe(gap_s)

    def ended(self, request: Request, outcome: str) -> None:
        """A request has ended: "stop", "length", "aborted" or "failed"."""
        name, count = _class(request), len(request.output_token_ids)
        self._ended.labels(name, outcome).inc()
        if request.first_token_s is None or request.last_token_s is None:
            return
        ttft_s = request.first_token_s - request.arrival_s
        tpot_s = (request.last_token_s - request.first_token_s) / (count - 1) if count > 1 else None
        self._ttft.labels(name).observe(ttft_s)
        if tpot_s is not None:
            self._tpot.labels(name).observe(tpot_s)
        if outcome in ("stop", "length"):
            self._e2el.labels(name).observe(request.last_token_s - request.arrival_s)
        if request.slo is not None and outcome != "aborted":
            completed = outcome != "failed"
            met = {"ttft": completed and ttft_s <= request.slo.ttft_s,
                   "tpot": completed and (tpot_s is None or tpot_s <= request.slo.tpot_s)}
            for target, was_met in met.items():
                self._targets.labels(target, "yes" if was_met else "no").inc()
            self._totals["rt_ended"] += 1
            self._totals["rt_on_time"] += all(met.values())

    def totals(self) -> dict[str, int]:
        """Tokens of both classes, real-time requests that ended and those that met both targets, since the start."""
        return {name: self._totals[name] for name in ("rt_tokens", "be_tokens", "rt_ended", "rt_on_time")}

    def step(self, record: StepRecord, overwritten: int, began: list[tuple[str, float]]) -> None:
        """A step was taken. `overwritten`: slots that real-time tokens took from best-effort ones; `began`: class and
        waiting time, seconds, of the requests that ran for the first time."""
        self._step.observe(record.duration_s)
        if record.predicted_s and record.duration_s > 0:
            self._predicted.observe(record.predicted_s / record.duration_s)
        for event, count in record.copied.items():
            self._slots.labels(SLOT_EVENTS[event]).inc(count)
        self._slots.labels("overwritten").inc(overwritten)
        self._recomputed.inc(record.recomputed_tokens)
        for name, waited_s in began:
            self._queued.labels(name).observe(max(0.0, waited_s))

    def read_engine(self, engine: LLMEngine) -> None:
        """Sets the gauges: who is in the engine, and how its blocks are owned."""
        states = Tally(view.state for view in engine.scheduler.kv.snapshot())
        for state in BLOCK_STATES:
            self._blocks.labels(state).set(states[state])
        running = {request.request_id for request in engine.scheduler.running}
        found = Tally((_class(request), "running" if name in running else "waiting")
                      for name, request in engine.scheduler.requests.items())
        for name in ("rt", "be"):
            for state in ("running", "waiting"):
                self._requests.labels(name, state).set(found[name, state])

    # -- in the event loop --------------------------------------------------------------------------------------

    def http(self, route: str, status: int) -> None:
        """An HTTP answer was started."""
        self._http.labels(route, str(status)).inc()

    def batch_lines(self, counts: dict[str, int]) -> None:
        """Lines of the batches that have not ended, by state."""
        for state in LINE_STATES:
            self._lines.labels(state).set(counts.get(state, 0))

    def page(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


def _class(request: Request) -> str:
    return request.request_class.value
