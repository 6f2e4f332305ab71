"""The shared parts of the players: controls, a legend, the scripts, and the piece of HTML that holds them.

A player is one <div>: native controls, canvases, its data as JSON and its scripts. Nothing is fetched and no kernel is
needed, so it works the same in a notebook, a static page and a file, and outputs of two runs can be compared. So the
players are not ipywidgets, whose state is saved apart from the page and which stay blank where no kernel runs. Python
never needs the step that is shown: it can compute the same pool as `trace.pool_at(step)`.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape, unescape
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


# Without scripts an image stays and a page stays hidden; these two change that, for every output on the page.
INLINE = """<script>for (const image of document.querySelectorAll('img[data-bros-still]')) {
  const bytes = Uint8Array.from(atob(image.src.split(',')[1]), (one) => one.charCodeAt(0));
  image.outerHTML = new TextDecoder().decode(bytes);
}</script>"""
WAKE = """<script>for (const page of document.querySelectorAll('[data-bros-asleep]')) {
  page.previousElementSibling.remove();
  page.removeAttribute('data-bros-asleep');
  page.style.display = '';
}</script>"""
RUN_IT = "Run this cell to bring it to life"
VIEW_BOX = re.compile(r'viewBox="0 0 ([\d.]+) [\d.]+"')
LABEL = re.compile(r'aria-label="([^"]*)"|<title>([^<]*)</title>')


def label_of(svg: str) -> str:
    """What an <svg> element is called for screen readers: its aria-label, else its first title."""
    label = LABEL.search(svg)
    return unescape(label[1] or label[2] or "") if label else ""


def still_image(svg: str) -> str:
    """An <svg> element as an <img> with the same label, as wide as its view box."""
    box, image = VIEW_BOX.search(svg), b64encode(svg.encode(errors="replace")).decode()
    width = f'width="{float(box[1]):.0f}" ' if box else ""
    return (f'<img data-bros-still alt="{escape(label_of(svg))}" {width}style="background:#fff;max-width:100%;'
            f'height:auto" src="data:image/svg+xml;base64,{image}">')


def with_images(page: str) -> str:
    """HTML whose <svg> elements are images until a script runs. JupyterLab removes the elements, but not the text in
    them, from the outputs of a notebook that it does not trust; the drawings themselves have tooltips."""
    return re.sub(r"<svg\b.*?</svg>", lambda svg: still_image(svg[0]), page, flags=re.DOTALL) + INLINE


class Picture:
    """An <svg> element as the output of a cell. `IPython.display.SVG` is a line of text where the notebook is not
    trusted.

    Raises:
        ValueError: it is no <svg> element.
    """

    def __init__(self, svg: str) -> None:
        if not svg.lstrip().startswith("<svg"):
            raise ValueError(f"a picture is an <svg> element, got {svg[:40]!r}")
        self.svg = svg

    def __repr__(self) -> str:
        return label_of(self.svg) or "a picture"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": with_images(self.svg)}


def notebook_output(text: str, page: str, still: str) -> dict[str, str]:
    """What a notebook saves of a widget, by MIME type.

    JupyterLab shows the outputs of a notebook that it does not trust without scripts and without SVG elements. So the
    page comes asleep: hidden, behind its still as an image and a sentence that says what to do. Where scripts run, the
    first one of the page takes both away and shows it, before the others measure what they draw in.

    Args:
        text: one line for a terminal.
        page: the widget's own HTML.
        still: the widget's picture, an <svg> element.
    """
    shown = f"<div>{still_image(still)}<p>{RUN_IT}.</p></div>"
    asleep = f'<div data-bros-asleep style="display:none">{WAKE}{page}</div>'
    return {"text/plain": text, "text/html": shown + asleep}


def panel_output(text: str, page: str) -> dict[str, str]:
    """What a notebook saves of a panel whose buttons a kernel serves: its present state, by MIME type.

    Args:
        text: one line for a terminal.
        page: the state as HTML, without the buttons.
    """
    return {"text/plain": text, "text/html": with_images(page) + f"<p>{RUN_IT}: its buttons need a running kernel.</p>"}
