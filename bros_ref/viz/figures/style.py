"""One look for all figures: the name of each thing, its colour, and the pattern that tells it apart without colour.

Colours are chosen to differ in lightness too, for readers who see fewer hues and for paper. Invariant: what a
figure shows by colour it also shows by pattern, dash, marker or label.
"""

from __future__ import annotations

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
RT_COLOUR, BE_COLOUR, SHARED_COLOUR, LOST_COLOUR, EMPTY_COLOUR = "#1f5fbf", "#f0a432", "#7b4bb3", "#c4302b", "#eef1f6"
RESTORED_COLOUR, MOVED_COLOUR = "#bfe3d3", "#dccbf0"
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


def svg_pattern(name: str, fill: Fill) -> str:
    """A <pattern> for `fill="url(#name)"`."""
    marks = ""
    if fill.mark:
        path, width = MARKS[fill.mark]
        marks = f'<path d="{path}" stroke="{fill.mark_colour}" stroke-width="{width}"/>'
    return (f'<pattern id="{name}" width="7" height="7" patternUnits="userSpaceOnUse">'
            f'<rect width="7" height="7" fill="{fill.colour}"/>{marks}</pattern>')


CLASS_LABELS = {"rt": "real-time", "be": "best-effort"}

PHASE_LOOKS = {
    WAITING: Look("waiting, holds no KV", "#d5dbe4", "."),
    PREFILL: Look("prefill or recompute", "#143f86", "/"),
    DECODE: Look("decode", "#6ea4ee"),
    PENDING: Look("pending, keeps its KV", "#f7d9a3", "x"),
    RESTORING: Look("runs and restores KV", LOST_COLOUR, "\\"),
}

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

# One for each policy of a comparison, by its place in it.
POLICY_COLOURS = ("#5a6675", "#1f5fbf", "#d9822b", "#2c8c6b", "#9c3fa3", "#c4302b", "#8a6d1d", "#23a2b5", "#444c9c")
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


def dress(figure: go.Figure, height_px: int) -> go.Figure:
    """Gives a figure the common fonts, grid, margins and a legend above it. Returns the same figure."""
    figure.update_layout(
        height=height_px, autosize=True, paper_bgcolor=PAPER, plot_bgcolor=PAPER, template="none",
        font={"family": FONT, "size": 13, "color": INK}, margin={"l": 64, "r": 20, "t": 56, "b": 52},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "top", "yref": "container",
                "font": {"size": 12.5}, "itemsizing": "trace"},
        hoverlabel={"font": {"family": FONT, "size": 12}}, barcornerradius=2)
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor="#b8c0cc", ticks="outside", tickcolor="#b8c0cc",
                        ticklen=4, title_standoff=10, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor="#b8c0cc", title_standoff=10, automargin=True)
    return figure
