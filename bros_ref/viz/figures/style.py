"""One look for all figures: the name of each thing, its colour, and the pattern that tells it apart without colour.

A colour means one thing: blue is real-time, orange is best-effort, purple is both, red is late or wrong. A pattern says
what a request does, or what a slot holds. Where all requests are of one class, each request has its own colour instead.
Colours differ in lightness too, for readers who see fewer hues and for paper. Invariant: what a figure shows by colour
it also shows by pattern, dash, marker or label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go

from bros_ref.trace import (
    BATCH_CAP,
    BEHIND,
    DEADLINE,
    DECODE,
    NO_BLOCKS,
    PENDING,
    PREFILL,
    RESTORING,
    TOKEN_BUDGET,
    WAITING,
)

INK, MUTED, GRID, PAPER = "#18212f", "#5a6675", "#e4e8ee", "#ffffff"
RT_COLOUR, BE_COLOUR, SHARED_COLOUR, EMPTY_COLOUR = "#1f5fbf", "#f0a432", "#7b4bb3", "#eef1f6"
ALARM_COLOUR = "#c4302b"  # a deadline and what comes after it; what is wrong, or done twice
PLAIN_COLOUR = "#41506a"  # where there is one kind of thing, and no class
PALE_COLOURS = {"rt": "#dbe7f8", "be": "#fdebcd"}  # of a class: the ground of what holds still
DARK_COLOURS = {"rt": "#143f86", "be": "#8a5200"}  # of a class: marks on its ground
LOG_TICKS = [base * 10.0**power for power in range(-4, 5) for base in (1, 2, 5)]  # for logarithmic axes
FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Look:
    """How one thing is drawn. `pattern` is a fill pattern of plotly: "", "/", "\\\\", "x", "-", "|", "+" or "."."""

    label: str
    colour: str
    pattern: str = ""


@dataclass(frozen=True)
class Fill:
    """A colour, and marks on it: "", or one of MARKS. Drawings in a page and stills fill alike."""

    colour: str
    mark: str = ""
    mark_colour: str = ""


# Paths on a tile of 7 x 7, and their width; `hatch` in static/controls.js draws the same marks.
MARKS = {"/": ("M-1 8L8 -1M-1 1L1 -1M6 8L8 6", 1.3), "\\": ("M-1 -1L8 8M6 -1L8 1M-1 6L1 8", 1.3),
         "x": ("M1.5 1.5L5.5 5.5M5.5 1.5L1.5 5.5", 1.4), "|": ("M3.5 0L3.5 7", 1.3), "-": ("M0 3.5L7 3.5", 1.3),
         ".": ("M2.5 3.5L4.5 3.5", 2.0), "+": ("M3.5 1L3.5 6M1 3.5L6 3.5", 1.3)}


def on_paper(svg: str) -> str:
    """An <svg> element with a background of its own: on a dark page its dark text would not be seen."""
    head, rest = svg.split(">", 1)
    if 'style="' not in head:
        head += ' style=""'
    return head.replace('style="', f'style="background:{PAPER};', 1) + ">" + rest


def round_values(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most about `most` of them: ticks of an axis."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(base * power for base in (1, 2, 5, 10) if base * power >= (high - low) / most)
    return [round(i * step, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg_pattern(name: str, fill: Fill) -> str:
    """A <pattern> for `fill="url(#name)"`."""
    marks = ""
    if fill.mark:
        path, width = MARKS[fill.mark]
        marks = f'<path d="{path}" stroke="{fill.mark_colour}" stroke-width="{width}"/>'
    return (f'<pattern id="{name}" width="7" height="7" patternUnits="userSpaceOnUse">'
            f'<rect width="7" height="7" fill="{fill.colour}"/>{marks}</pattern>')


CLASS_LABELS = {"rt": "real-time", "be": "best-effort"}

CLASS_COLOURS = {"rt": RT_COLOUR, "be": BE_COLOUR}

PHASE_LABELS = {WAITING: "waiting, holds no KV", PREFILL: "prefill or recompute", DECODE: "decode",
                PENDING: "pending, keeps its KV", RESTORING: "runs and restores KV"}
PHASE_MARKS = {WAITING: ".", PREFILL: "/", DECODE: "", PENDING: "-", RESTORING: "+"}


def phase_fill(request_class: str, phase: str) -> Fill:
    """How a request of a class ("rt" or "be") is drawn in a phase: the class is the colour, the phase the pattern.
    Phases in which it does not run have a pale ground."""
    if phase in (WAITING, PENDING):
        return Fill(PALE_COLOURS[request_class], PHASE_MARKS[phase], DARK_COLOURS[request_class])
    mark_colour = PAPER if request_class == "rt" else DARK_COLOURS["be"]
    return Fill(CLASS_COLOURS[request_class], PHASE_MARKS[phase], mark_colour)


# Grounds and marks of single requests; 8 and 7 have no common divisor, so 56 requests look different.
REQUEST_GROUNDS = (("#cfe0f7", "#1f5fbf"), ("#fbdcae", "#8a5200"), ("#cdeccf", "#22702b"), ("#f3cfe4", "#9c2f78"),
                   ("#e0d4f5", "#5b2d91"), ("#f6d0c8", "#a03a22"), ("#c9ecec", "#0f6b6b"), ("#ebe6b5", "#6b6212"))
REQUEST_MARKS = ("", "/", ".", "\\", "-", "|", "+")
NUM_REQUEST_FILLS = len(REQUEST_GROUNDS) * len(REQUEST_MARKS)


def request_fill(place: int) -> Fill:
    """How the request at `place` is drawn where all requests are of one class; fills repeat after 56."""
    ground, mark_colour = REQUEST_GROUNDS[place % len(REQUEST_GROUNDS)]
    return Fill(ground, REQUEST_MARKS[place % len(REQUEST_MARKS)], mark_colour)


# In stacking order, from the bottom.
BLOCK_LOOKS = {
    "be_only": Look("best-effort only", BE_COLOUR, "/"),
    "shared": Look("shared by both", SHARED_COLOUR, "x"),
    "rt_only": Look("real-time only", RT_COLOUR, "\\"),
    "empty": Look("empty", EMPTY_COLOUR),
}

REASON_LABELS = {
    DEADLINE: "a deadline would break",
    NO_BLOCKS: "no KV blocks",
    BATCH_CAP: "batch full",
    TOKEN_BUDGET: "token budget used up",
    BEHIND: "behind one of these",
}

# One for each policy of a comparison, by its place in it. None is the colour of a class.
POLICY_COLOURS = ("#5a6675", "#0b7a75", "#a8326f", "#4c8c2b", "#7a4f2a", "#18212f", "#8a7d12", "#1b8fa1", "#c2589c")
POLICY_DASHES = ("dot", "solid", "dash", "dashdot", "longdash", "longdashdot", "6px,3px", "2px,4px", "12px,3px")
POLICY_MARKERS = ("circle", "diamond", "square", "triangle-up", "x", "star", "triangle-down", "pentagon", "cross")
POLICY_PATTERNS = ("", "/", "x", "\\", ".", "-", "+", "|", "")


@dataclass(frozen=True)
class PolicyLook:
    """How one policy is drawn: told apart by colour, and by dash, marker and pattern without it."""

    colour: str
    dash: str
    marker: str
    pattern: str


def policy_look(place: int) -> PolicyLook:
    """The look of the policy at `place` in a comparison; they repeat after nine."""
    i = place % len(POLICY_COLOURS)
    return PolicyLook(POLICY_COLOURS[i], POLICY_DASHES[i], POLICY_MARKERS[i], POLICY_PATTERNS[i])


TOOLBAR_PX = 26  # the strip above the legend: the title at its left, plotly's toolbar at its right


def dress(figure: go.Figure, height_px: int, title: str = "") -> go.Figure:
    """Gives a figure the common fonts, grid, margins, a title, and a legend below plotly's toolbar. Returns the same
    figure.

    Args:
        title: names what the plot is of; the policy, where it shows one.
    """
    top = 1 - TOOLBAR_PX / height_px
    figure.update_layout(
        height=height_px, autosize=True, paper_bgcolor=PAPER, plot_bgcolor=PAPER, template="none",
        font={"family": FONT, "size": 13, "color": INK}, margin={"l": 64, "r": 20, "t": TOOLBAR_PX + 50, "b": 52},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": top, "yanchor": "top", "yref": "container",
                "font": {"size": 12.5}, "itemsizing": "trace"},
        modebar={"remove": ["select2d", "lasso2d", "autoScale2d"], "color": MUTED, "activecolor": INK},
        hoverlabel={"font": {"family": FONT, "size": 12}}, barcornerradius=2)
    if title:
        figure.update_layout(title={"text": title, "x": 0, "xref": "paper", "xanchor": "left", "y": 1 - 6 / height_px,
                                    "yref": "container", "yanchor": "top", "font": {"size": 14}})
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor="#b8c0cc", ticks="outside", tickcolor="#b8c0cc",
                        ticklen=4, title_standoff=10, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor="#b8c0cc", title_standoff=10, automargin=True)
    return figure
