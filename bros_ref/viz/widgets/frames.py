"""A series of pictures: a slider, a play button and a caption over a list of SVG stills, in one piece of HTML.

The page contains all its pictures, so moving the slider fetches nothing (`html.py`). Keyboard: the controls are
native. Where scripts do not run (a web viewer), the first picture is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bros_ref.viz.widgets.html import controls_html, notebook_output, widget_html


@dataclass(frozen=True)
class Frame:
    """One still: an <svg> element as text, and the sentence that describes it."""

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
        """A <div> that holds everything: stills, controls, script."""
        stills = "".join(f'<div data-frame="{i}"{" hidden" if i else ""}>{frame.svg}</div>'
                         for i, frame in enumerate(self.frames))
        body = (f'{controls_html(len(self.frames) - 1, 0, speed=1)}<div role="status">'
                f"{escape(self.frames[0].caption)}</div>{stills}")
        return widget_html("frames", self.label, body, {"captions": [frame.caption for frame in self.frames]},
                           ("controls.js", "frames.js"))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_output(repr(self), self.to_html(), self.frames[0].svg)
