"""Live panels: a running engine that takes bursts of real-time requests, and a KV manager that allocates, appends and
frees on request; both show the KV pool after each press.

The engine's panel draws from its trace alone and calls `add_request` and `step`; the manager's draws its `snapshot`.
ipywidgets is imported when a panel is made, so that the rest of the package does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Protocol

from bros_ref.trace import BlockView, Trace
from bros_ref.viz.figures.kv_blocks import block_map, pool_svg
from bros_ref.viz.figures.style import INK, PAPER
from bros_ref.viz.widgets.html import panel_output
from bros_ref.viz.widgets.kernel_watch import kernel_watch
from bros_ref.viz.widgets.player import step_note


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
        burst: burst index -> its requests.
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
        self.widget = ipywidgets.VBox([buttons, kernel_watch(), self.picture])
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
            note = f"step {last + 1}, {step_note(self.trace, self.trace.steps[last])}"
            self.picture.value = _shown("inject", self.bursts, note, block_map(self.trace, last))

    def __repr__(self) -> str:
        return f"a panel of {self.trace.num_blocks} blocks and two buttons"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(**kwargs), **panel_output(repr(self), self.picture.value)}


class PoolManager(Protocol):
    """What a pool panel needs of a KV manager."""

    block_size: int

    def begin_step(self) -> None: ...
    def allocate_slots(self, request: Any, num_new_tokens: int) -> list[int] | None: ...
    def free(self, request_id: str) -> None: ...
    def snapshot(self) -> list[BlockView]: ...


def holdings(pool: Sequence[BlockView]) -> dict[str, tuple[int, list[int]]]:
    """Request -> how many tokens it has on the device, and its blocks in logical order."""
    entries: dict[str, list[tuple[int, int, int]]] = {}
    for block_id, view in enumerate(pool):
        if view.rt_owner is not None:
            entries.setdefault(view.rt_owner, []).append((view.rt_index, block_id, view.rt_fill))
        if view.be_owner is not None:
            entries.setdefault(view.be_owner, []).append((view.be_index, block_id, view.be_fill - view.overwritten))
    return {name: (sum(tokens for _, _, tokens in mine), [block_id for _, block_id, _ in sorted(mine)])
            for name, mine in entries.items()}


class PoolPanel:
    """Three buttons on a KV manager: add a request, append one token to each, and free the oldest. The block table of
    each request is below the pool.

    Args:
        kv: the manager; it may hold requests already, which the panel leaves alone.
        make_request: request index -> (request, tokens of its prompt).
    """

    def __init__(self, kv: PoolManager, make_request: Callable[[int], tuple[Any, int]]) -> None:
        import ipywidgets

        self.kv, self.make_request = kv, make_request
        self.living: list[Any] = []
        self.made = 0
        self.owners: dict[str, str] = {}  # of every request that was seen in the pool: its class
        self.picture = ipywidgets.HTML()
        self.buttons = {}
        presses = {"new request": self.allocate, "one token each": self.append, "oldest leaves": self.free}
        for label, press in presses.items():
            self.buttons[label] = ipywidgets.Button(description=label, layout={"width": "auto"})
            self.buttons[label].on_click(lambda _, press=press: self._show(press()))
        buttons = ipywidgets.HBox(list(self.buttons.values()))
        self.widget = ipywidgets.VBox([buttons, kernel_watch(), self.picture])
        self._show("press a button")

    def allocate(self) -> str:
        """Adds a request with its whole prompt; says so if there is no room."""
        request, tokens = self.make_request(self.made)
        self.kv.begin_step()
        if self.kv.allocate_slots(request, tokens) is None:
            return f"no room for {tokens} tokens: the answer is None, and nothing changed"
        self.made += 1
        self.living.append(request)
        return f"{request.request_id} came with {tokens} tokens"

    def append(self) -> str:
        """Appends one token to every request that finds a slot."""
        self.kv.begin_step()
        without = [one.request_id for one in self.living if self.kv.allocate_slots(one, 1) is None]
        return "every request grew by a token" if not without else f"no slot for {', '.join(without)}"

    def free(self) -> str:
        """Frees the blocks of the oldest request."""
        if not self.living:
            return "nobody is there"
        oldest = self.living.pop(0)
        self.kv.free(oldest.request_id)
        return f"{oldest.request_id} left"

    def _show(self, note: str) -> None:
        pool = self.kv.snapshot()
        for view in pool:
            for owner, request_class in ((view.rt_owner, "rt"), (view.be_owner, "be")):
                if owner is not None:
                    self.owners.setdefault(owner, request_class)
        names = list(self.owners) if len(set(self.owners.values())) == 1 else []
        used = sum(view.state != "empty" for view in pool)
        tables = "".join(f"<li>{escape(name)}: {tokens} tokens, block table {table}</li>"
                         for name, (tokens, table) in sorted(holdings(pool).items()))
        picture = pool_svg(pool, self.kv.block_size, requests=names) + (f"<ul>{tables}</ul>" if tables else "")
        self.picture.value = _shown("pool", self.made, f"{note}; {used} of {len(pool)} blocks in use", picture)

    def __repr__(self) -> str:
        return "a panel of a KV pool and three buttons"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(**kwargs), **panel_output(repr(self), self.picture.value)}


def _shown(what: str, count: int, note: str, picture: str) -> str:
    return (f'<div data-bros-{what} data-count="{count}" style="background:{PAPER};color:{INK};padding:4px 8px">'
            f'<div role="status" aria-live="polite">{escape(note)}</div>{picture}</div>')
