"""Pictures one steps through: a slider, play and a caption over a list of SVG stills, in one piece of HTML.

No kernel, no widget state and no network is needed to move it: the page carries all its pictures, so a notebook, a
static book and a file play alike, and the output compares from run to run. Keyboard: the controls are native. Where
scripts do not run (a web viewer), the first picture is shown.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

_SCRIPT = """
for (const root of document.querySelectorAll('[data-bros-frames]:not([data-ready])')) {
  root.dataset.ready = 'yes';
  const slider = root.querySelector('input'), play = root.querySelector('button');
  const stills = [...root.querySelectorAll('[data-frame]')], status = root.querySelector('[role=status]');
  let timer = null;
  const show = () => {
    const at = Number(slider.value);
    stills.forEach((still, i) => { still.hidden = i !== at; });
    status.textContent = `${at + 1} of ${stills.length}: ${stills[at].dataset.caption}`;
    root.dataset.at = at;
  };
  const pause = () => { clearInterval(timer); timer = null; play.textContent = 'play'; };
  const step = () => {
    if (Number(slider.value) + 1 >= stills.length) { pause(); return; }
    slider.value = Number(slider.value) + 1;
    show();
  };
  slider.addEventListener('input', show);
  play.addEventListener('click', () => {
    if (timer !== null) { pause(); return; }
    if (Number(slider.value) + 1 >= stills.length) { slider.value = 0; show(); }
    timer = setInterval(step, 700);
    play.textContent = 'pause';
  });
  show();
}
"""


@dataclass(frozen=True)
class Frame:
    """One still: an <svg> element as text, and the sentence that says what is to be seen."""

    svg: str
    caption: str


class Frames:
    """Stills behind a slider.

    Raises:
        ValueError: no frames.
    """

    def __init__(self, frames: Sequence[Frame], label: str) -> None:
        if not frames:
            raise ValueError("there is nothing to step through: give at least one frame")
        self.frames, self.label = tuple(frames), label

    def __repr__(self) -> str:
        return f"{self.label}: {len(self.frames)} pictures"

    def to_html(self) -> str:
        """A <div> that holds everything: stills, controls, script. JupyterLab leaves the controls' keys alone."""
        stills = "".join(
            f'<div data-frame="{i}" data-caption="{html.escape(frame.caption, quote=True)}"{" hidden" if i else ""}>'
            f"{frame.svg}</div>" for i, frame in enumerate(self.frames))
        own_keys = 'data-lm-suppress-shortcuts="true"'
        return (f'<div data-bros-frames role="group" aria-label={json.dumps(self.label)}>'
                f'<button type="button" {own_keys}>play</button> '
                f'<label>step <input type="range" min="0" max="{len(self.frames) - 1}" value="0" step="1" {own_keys} '
                'style="width:60%;vertical-align:middle"></label>'
                f'<div role="status" aria-live="polite">{html.escape(self.frames[0].caption)}</div>{stills}'
                f"<script>{_SCRIPT}</script></div>")

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.to_html(), "image/svg+xml": self.frames[0].svg}
