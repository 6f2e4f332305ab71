"""The shared parts of the players: controls, a legend, the scripts, and the piece of HTML that holds them.

A player is one <div>: native controls, canvases, its data as JSON and its scripts. Nothing is fetched and no kernel is
needed, so it works the same in a notebook, a static page and a file, and outputs of two runs can be compared. So the
players are not ipywidgets, whose state is saved apart from the page and which stay blank where no kernel runs. Python
never needs the step that is shown: it can compute the same pool as `trace.pool_at(step)`.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from bros_ref.viz.figures.style import FONT, INK, MUTED, Fill

OWN_KEYS = 'data-lm-suppress-shortcuts="true"'  # JupyterLab leaves the keys of such an element alone
SPEEDS = (1, 2, 4, 10, 30)  # steps a second
Looks = Mapping[str, Fill]


def packed_fills(looks: Looks) -> dict[str, list[str]]:
    """As `hatch` in static/controls.js takes them."""
    return {kind: [fill.colour, fill.mark, fill.mark_colour] for kind, fill in looks.items()}


def controls_html(last: int, start: int, unit: str = "step", speed: int = 10) -> str:
    """Play, a slider from 0 to `last`, and steps per second."""
    options = "".join(f'<option value="{one}"{" selected" if one == speed else ""}>{one}</option>' for one in SPEEDS)
    return (f'<button type="button" data-play {OWN_KEYS} style="min-width:4.5em">play</button> '
            f'<label>{unit} <input type="range" min="0" max="{last}" value="{start}" step="1" {OWN_KEYS} '
            'style="width:420px;vertical-align:middle"></label> '
            f'<label>{unit}s a second <select data-speed {OWN_KEYS}>{options}</select></label>')


def request_select(request_ids: Sequence[str]) -> str:
    """The keyboard's way to choose a request."""
    options = "".join(f'<option value="{i}">{escape(request_id)}</option>' for i, request_id in enumerate(request_ids))
    return f'<label>request <select data-request {OWN_KEYS}><option value="-1">none</option>{options}</select></label>'


def legend_html(labels: Mapping[str, str]) -> str:
    """A painted sample and a label for each kind."""
    keys = "".join(f'<span style="white-space:nowrap"><canvas data-key="{kind}" aria-hidden="true" style="width:26px;'
                   f'height:12px;vertical-align:-1px"></canvas> {escape(label)}</span>'
                   for kind, label in labels.items())
    return f'<div style="display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12px;color:{MUTED}">{keys}</div>'


def script_json(data: Any) -> str:
    """Plain data as JSON that is safe inside a <script>; all data of pages goes through here. Without a "<" nothing
    in it can end the element or open a comment (`</script>`, `<!--<script>`), and everything outside ASCII is escaped,
    so no line separator (U+2028) can end a statement."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def widget_html(kind: str, label: str, body: str, data: Mapping[str, Any], scripts: Sequence[str]) -> str:
    """The whole of a player.

    Args:
        kind: what its script looks for: `data-bros-<kind>`.
        label: the accessible name, for screen readers.
        data: plain data for the script.
        scripts: files of `static/`, in order.
    """
    folder = files("bros_ref.viz").joinpath("static")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in scripts)
    return (f'<div data-bros-{kind} data-step="-1" role="group" aria-label="{escape(label)}" style="font:13px/1.5 '
            f'{escape(FONT)};color:{INK};background:#fff;overflow-x:auto">{body}'
            f'<script type="application/json">{script_json(data)}</script><script>{{{script}}}</script></div>')


def notebook_output(text: str, page: str, still: str) -> dict[str, str]:
    """What a notebook saves of a widget, by MIME type.

    JupyterLab shows the outputs of a notebook that it does not trust without scripts and without SVG elements. So the
    page comes with its still as an image, and with what to do. A script takes both away where scripts run.

    Args:
        text: one line for a terminal.
        page: the widget's own HTML.
        still: the widget's picture, an <svg> element.
    """
    image = b64encode(still.encode()).decode()
    shown = (f'<div><img alt="{escape(text)}" style="background:#fff;max-width:100%" '
             f'src="data:image/svg+xml;base64,{image}"><p>Run this cell to bring it to life.</p></div>')
    gone = "<script>document.currentScript.previousElementSibling.remove();</script>"
    return {"text/plain": text, "text/html": shown + gone + page, "image/svg+xml": still}
