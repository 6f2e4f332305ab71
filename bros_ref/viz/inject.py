"""A running engine under one's hands: a button sends a burst of real-time requests into it, and the KV pool shows what
they take and give back.

It draws from the engine's trace alone; of the engine it calls `add_request` and `step`. ipywidgets is imported when a
panel is made, so that the rest of the package does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bros_ref.trace import Trace
from bros_ref.viz.kv_blocks import block_map
from bros_ref.viz.player import step_note


class SteppedEngine(Protocol):
    """What a panel needs of an engine."""

    trace: Trace | None

    @property
    def has_unfinished(self) -> bool: ...
    def add_request(self, request: Any) -> None: ...
    def step(self) -> object: ...


class InjectPanel:
    """Two buttons and the pool.

    Args:
        engine: one with a trace.
        burst: the how-manieth burst -> its requests.
        steps: iterations that each press runs.

    Raises:
        ValueError: the engine has no trace.
    """

    def __init__(self, engine: SteppedEngine, burst: Callable[[int], Sequence[Any]], steps: int = 6) -> None:
        import ipywidgets

        if engine.trace is None:
            raise ValueError("the panel draws from the engine's trace, and this engine has none")
        self.engine, self.trace, self.burst, self.steps = engine, engine.trace, burst, steps
        self.bursts = 0
        self.inject_button = ipywidgets.Button(description="inject real-time requests", layout={"width": "auto"})
        self.run_button = ipywidgets.Button(description=f"run {steps} steps", layout={"width": "auto"})
        self.picture = ipywidgets.HTML()
        self.inject_button.on_click(lambda _: self.inject())
        self.run_button.on_click(lambda _: self.run())
        buttons = ipywidgets.HBox([self.inject_button, self.run_button])
        self.widget = ipywidgets.VBox([buttons, self.picture])
        self.run()

    def inject(self) -> None:
        """Adds a burst and runs."""
        for request in self.burst(self.bursts):
            self.engine.add_request(request)
        self.bursts += 1
        self.run()

    def run(self) -> None:
        """Runs the next steps, if there is anything to run, and draws the last."""
        for _ in range(self.steps):
            if self.engine.has_unfinished:
                self.engine.step()
        if self.trace.steps:
            last = len(self.trace.steps) - 1
            note = step_note(self.trace, self.trace.steps[last])
            self.picture.value = (f'<div data-bros-inject data-bursts="{self.bursts}"><div role="status" '
                                  f'aria-live="polite">step {last + 1}, {note}</div>{block_map(self.trace, last)}</div>')

    def __repr__(self) -> str:
        return f"a panel of {self.trace.num_blocks} blocks and two buttons"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget._repr_mimebundle_(**kwargs)
