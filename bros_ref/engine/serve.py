"""The serving loop: requests come due, the engine steps, time passes. The same loop live and simulated; no torch."""

from __future__ import annotations

from collections.abc import Callable

from bros_ref.engine.llm_engine import LLMEngine, OnText, RequestRefused, StepFailed
from bros_ref.request import Request
from bros_ref.scheduler import REFERENCE_POLICIES
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import Workload, WorkloadItem


class ServeInterrupted(KeyboardInterrupt):
    """Ctrl-C while serving.

    Attributes:
        trace: what was recorded by then, if anything records.
        failures: the steps that had failed by then.
    """

    def __init__(self, trace: Trace | None, failures: list[StepFailed]) -> None:
        super().__init__("serving was interrupted")
        self.trace, self.failures = trace, failures


def keep_class(items: list[WorkloadItem], policy: str) -> list[WorkloadItem]:
    """The items that a policy is to serve: all, or one class for the bounds `rt-only` and `be-only`."""
    wanted = REFERENCE_POLICIES.get(policy)
    return items if wanted is None else [item for item in items if item.request_class.value == wanted]


def serve(engine: LLMEngine, workload: Workload, to_request: Callable[[WorkloadItem], Request],
          until_s: float = float("inf"), on_step: Callable[[list[Request]], None] | None = None,
          on_text: OnText | None = None) -> list[StepFailed]:
    """Serves a workload: adds requests as they come due, steps while there is work, sleeps in between.

    A refused request and a failed step are recorded in the trace and end no other request. `on_step` is called
    after each step with the requests that ended in it.

    Returns:
        The steps that failed, each with its cause and the requests that it ended: for the caller to tell.

    Raises:
        ServeInterrupted: Ctrl-C. The engine can go on from where it is.
    """
    failures: list[StepFailed] = []
    try:
        _serve(engine, workload, to_request, until_s, on_step, on_text, failures)
    except KeyboardInterrupt as interrupt:
        raise ServeInterrupted(engine.trace, failures) from interrupt
    return failures


def _serve(engine: LLMEngine, workload: Workload, to_request: Callable[[WorkloadItem], Request], until_s: float,
           on_step: Callable[[list[Request]], None] | None, on_text: OnText | None, failures: list[StepFailed]) -> None:
    """The loop; it adds to `failures`."""
    clock = engine.clock
    while clock.now_s() < until_s:
        for item in workload.due(clock.now_s()):
            try:
                engine.add_request(to_request(item), on_text)
            except RequestRefused:
                workload.on_finished(item.request_id, clock.now_s())
        for request_id in workload.out & engine.aborted:  # by a callback: no step returns them
            workload.on_finished(request_id, clock.now_s())
        ended: list[str] = []
        if engine.has_unfinished:
            try:
                finished = engine.step()
                ended = [request.request_id for request in finished]
                if on_step is not None:
                    on_step(finished)
            except StepFailed as failure:
                ended = failure.failed
                failures.append(failure)
        elif (next_s := workload.next_arrival_s()) is not None:
            clock.sleep_until(min(next_s, until_s))
        elif workload.exhausted:
            break
        for request_id in ended:
            workload.on_finished(request_id, clock.now_s())
