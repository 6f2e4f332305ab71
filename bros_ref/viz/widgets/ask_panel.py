"""A panel on a running engine: ask a question now, run single steps or play, and watch the effect on every request.

It shows the growing text of each request, the slack of the real-time ones, and the KV pool. The panel calls
`add_request` and `step`, and draws from the engine's trace and streams. Invariant: while it plays, the kernel handles
button presses between two steps, so a question can be asked while the engine is busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from html import escape
from typing import Any, Protocol

from bros_ref.viz.figures.gantt import CLASS_MARKS, phase_steps, what_it_does
from bros_ref.viz.figures.kv_blocks import block_map
from bros_ref.viz.figures.style import INK, PAPER
from bros_ref.viz.widgets.html import panel_output
from bros_ref.viz.widgets.kernel_watch import kernel_watch
from bros_ref.viz.widgets.panels import SteppedEngine
from bros_ref.viz.widgets.player import step_note

MAX_CHARACTERS = 160  # shown of a text: its last ones
CELL = f"text-align:left;vertical-align:top;background:{PAPER};color:{INK}"  # JupyterLab has looks of its own


class StreamingEngine(SteppedEngine, Protocol):
    """What this panel needs of an engine. `streams`: request id -> an object whose `text` is its text so far."""

    @property
    def streams(self) -> Mapping[str, Any]: ...


class AskPanel:
    """A text box, buttons to ask, step and play, and the state of every request.

    Args:
        engine: has a trace and a tokenizer, and may already have requests.
        ask: (number of the question, its text) -> a request that arrives now.

    Raises:
        ValueError: the engine has no trace.
    """

    def __init__(self, engine: StreamingEngine, ask: Callable[[int, str], Any]) -> None:
        import ipywidgets

        if engine.trace is None:
            raise ValueError("the panel draws from the engine's trace, and this engine has none")
        self.engine, self.trace, self.ask = engine, engine.trace, ask
        self.asked = 0
        self.playing: asyncio.Task[None] | None = None
        self.box = ipywidgets.Text(placeholder="What is the capital of France?", description="question")
        self.ask_button, self.step_button, self.play_button = (
            ipywidgets.Button(description=label, layout={"width": "auto"}) for label in ("ask now", "one step", "play"))
        self.ask_button.on_click(lambda _: self.ask_now())
        self.step_button.on_click(lambda _: self.step())
        self.play_button.on_click(lambda _: self.play_or_pause())
        self.picture = ipywidgets.HTML()
        buttons = ipywidgets.HBox([self.box, self.ask_button, self.step_button, self.play_button])
        self.widget = ipywidgets.VBox([buttons, kernel_watch(), self.picture])
        self._show()

    def ask_now(self) -> None:
        """Sends the text in the box, or the example if it is empty, to the engine. Shows the reason of a refusal."""
        number, self.asked = self.asked, self.asked + 1
        try:
            self.engine.add_request(self.ask(number, self.box.value.strip() or self.box.placeholder))
        except ValueError as error:
            self._show(str(error))
            return
        self.box.value = ""
        self._show()

    def step(self) -> None:
        """Runs one iteration if a request is unfinished."""
        if self.engine.has_unfinished:
            self.engine.step()
        self._show()

    def play_or_pause(self) -> None:
        """Runs until all requests have finished or the button is pressed again."""
        if self.playing is not None:
            self.playing.cancel()
            self._stopped()
            return
        self.play_button.description = "pause"
        self.playing = asyncio.get_event_loop().create_task(self._play())

    async def _play(self) -> None:
        while self.engine.has_unfinished:
            self.step()
            await asyncio.sleep(0.01)  # lets the kernel handle messages from the browser
        self._stopped()

    def _stopped(self) -> None:
        self.playing = None
        self.play_button.description = "play"

    def _show(self, refusal: str = "") -> None:
        steps = self.trace.steps
        note, pool, slack_s = refusal or "nothing has run yet", "", dict[str, float]()
        if steps:
            slack_s = steps[-1].slack_s
            note = refusal or f"step {len(steps)}, {step_note(self.trace, steps[-1])}"
            pool = block_map(self.trace, len(steps) - 1)
        spans = phase_steps(self.trace)
        rows = "".join(self._row(name, slack_s.get(name), spans) for name in self.trace.requests)
        head = "".join(f'<th scope="col" style="{CELL}">{title}</th>'
                       for title in ("request", "in the last step", "slack", "text so far"))
        self.picture.value = (
            f'<div data-bros-ask data-count="{len(steps)}" data-asked="{self.asked}" style="background:{PAPER};'
            f'color:{INK};padding:4px 8px"><div role="status" '
            f'aria-live="polite">{escape(note)}</div><table style="border-spacing:10px 2px"><tr>{head}</tr>{rows}'
            f"</table>{pool}</div>")

    def _row(self, request_id: str, slack_s: float | None, spans: dict[str, list[tuple[str, int, int]]]) -> str:
        stream = self.engine.streams.get(request_id)
        text = "" if stream is None else stream.text
        cells = (f"{CLASS_MARKS[self.trace.requests[request_id].request_class]} {request_id}",
                 self._state(request_id, spans), "" if slack_s is None else f"{1e3 * slack_s:.0f} ms",
                 f"… {text[-MAX_CHARACTERS:]}" if len(text) > MAX_CHARACTERS else text)
        return (f'<tr data-request="{escape(request_id)}">'
                + "".join(f'<td style="{CELL}">{escape(cell)}</td>' for cell in cells) + "</tr>")

    def _state(self, request_id: str, spans: dict[str, list[tuple[str, int, int]]]) -> str:
        if any(request_id in step.finished for step in self.trace.steps):
            return "has ended"
        last = len(self.trace.steps) - 1
        return (what_it_does(self.trace, spans, last, request_id) if last >= 0 else "") or "has just come"

    def __repr__(self) -> str:
        return f"a panel of {len(self.trace.requests)} requests: ask now, one step, play"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(**kwargs), **panel_output(repr(self), self.picture.value)}
