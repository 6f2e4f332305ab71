"""Admission control: refuses a request whose class has a full queue and, with `reject_late`, a target out of reach.

It neither orders nor delays requests; the scheduler does that. It runs in the engine's thread, between two steps, when
a request is about to be added.
"""

from __future__ import annotations

from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.request import Request
from bros_ref.scheduler.latency_model import StepFeatures
from bros_ref.server.errors import APIError
from bros_ref.server.settings import ServerSettings


class Gate:
    """Decides whether a request may enter."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings

    def __call__(self, engine: LLMEngine, request: Request, num_waiting: int) -> APIError | None:
        """Returns the refusal, or None. `num_waiting`: requests of its class without a first token."""
        settings = self._settings
        if request.is_rt and num_waiting >= settings.max_queued_rt:
            return APIError(503, f"{num_waiting} real-time requests are waiting, which is this server's limit; "
                                 "try again later", code="rt_full")
        if not request.is_rt and num_waiting >= settings.max_queued_be:
            return APIError(429, f"{num_waiting} best-effort requests are waiting, which is this server's limit; "
                                 "try again later, or send a batch", code="be_full")
        if request.slo is not None and settings.reject_late:
            expected_s = expected_ttft_s(engine, request)
            if expected_s > request.slo.ttft_s:
                return APIError(503, f"the first token is expected after {expected_s:.2f} s, later than the target of "
                                     f"{request.slo.ttft_s:g} s; try again later, or ask for a longer ttft_s",
                                code="slo_out_of_reach")
        return None


def expected_ttft_s(engine: LLMEngine, request: Request) -> float:
    """The earliest time of the first token, in seconds after arrival: the time already passed, plus the prompts of
    real-time requests with earlier deadlines, plus its own, as the latency model predicts with its safety factor."""
    features, latency = StepFeatures(), engine.scheduler.latency
    due_s = request.deadline_s
    for other in engine.scheduler.requests.values():
        if other.is_rt and other.first_token_s is None and other.deadline_s <= due_s:
            features.add(other.num_tokens - other.num_computed_tokens, other.num_computed_tokens)
    features.add(request.num_prompt_tokens, 0)
    return engine.clock.now_s() - request.arrival_s + latency.predict(features) * latency.safety
