"""The page around the figures: its style sheet, and the small pieces of HTML that the report is put together from.

It knows no traces. Invariant: every string from outside goes through `html.escape`, nothing refers to another file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

import plotly.graph_objects as go
import plotly.io as pio

from bros_ref.viz.figures.style import FONT

CSS = f"""
:root {{ --ink:#18212f; --muted:#55606f; --line:#dfe4eb; --soft:#f6f8fb; --rt:#1f5fbf; --be:#a8650a; --bad:#b3261e;
  --good:#1b7a50; }}
* {{ box-sizing:border-box; }}
body {{ margin:0; font:16px/1.6 {FONT}; color:var(--ink); background:#fff; }}
main, header > div, footer {{ max-width:1160px; margin:0 auto; padding:0 28px; }}
header {{ background:linear-gradient(125deg,#0f1b30 0%,#17325f 62%,#31477e 100%); color:#fff; padding:46px 0 38px; }}
header h1 {{ font-size:38px; line-height:1.15; letter-spacing:-.02em; margin:0 0 12px; font-weight:700; }}
header p {{ font-size:16px; max-width:780px; margin:10px 0 0; color:#d7e0f0; }}
header p.verdict {{ font-size:20px; line-height:1.45; margin:0; color:#fff; }}
.facts {{ display:flex; flex-wrap:wrap; gap:10px 30px; margin:26px 0 0; }}
.facts dt {{ font-size:12px; letter-spacing:.06em; text-transform:uppercase; color:#a9bad8; }}
.facts dd {{ margin:0; font-size:15px; font-weight:600; }}
nav {{ border-bottom:1px solid var(--line); background:#fff; position:sticky; top:0; z-index:5; }}
nav ul {{ max-width:1160px; margin:0 auto; padding:0 28px; list-style:none; display:flex; flex-wrap:wrap;
  gap:4px 24px; }}
nav a {{ display:inline-block; padding:11px 0; font-size:14px; color:var(--muted); text-decoration:none; }}
nav a:hover, nav a:focus-visible {{ color:var(--rt); text-decoration:underline; text-underline-offset:4px; }}
.cards {{ display:grid; grid-template-columns:repeat(auto-fit,minmax(232px,1fr)); gap:16px; margin:34px 0 6px; }}
.card {{ border:1px solid var(--line); border-top:4px solid var(--rt); border-radius:8px; padding:16px 18px 14px; }}
.card.be {{ border-top-color:#f0a432; }} .card.kv {{ border-top-color:#7b4bb3; }}
.card .value {{ font-size:33px; font-weight:700; letter-spacing:-.02em; line-height:1.25; }}
.card .unit {{ font-size:16px; font-weight:600; letter-spacing:0; }}
.card p {{ margin:0; font-size:13.5px; color:var(--muted); }} .card .what {{ font-weight:600; }}
section {{ padding-top:14px; scroll-margin-top:44px; }}
h2 {{ font-size:25px; letter-spacing:-.015em; line-height:1.25; margin:44px 0 6px; }}
section > p {{ max-width:800px; margin:4px 0 12px; }}
.scroll {{ overflow-x:auto; }}
table {{ border-collapse:collapse; width:100%; font-size:14.5px; font-variant-numeric:tabular-nums; }}
caption {{ text-align:left; font-size:17px; font-weight:700; padding:22px 0 6px 4px; }}
th, td {{ padding:9px 12px; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap; }}
thead th {{ vertical-align:bottom; font-size:13px; color:var(--muted); font-weight:600; white-space:normal;
  border-bottom:2px solid #b9c2cf; }}
th:first-child {{ text-align:left; padding-left:4px; }}
tbody th {{ font-weight:600; }}
td small {{ display:block; color:var(--muted); font-size:12.5px; font-weight:400; line-height:1.3; }}
thead th.prose {{ text-align:left; }}
td.prose {{ text-align:left; white-space:normal; min-width:210px; font-size:13px; line-height:1.35;
  color:var(--muted); }}
td.best {{ font-weight:700; }} td.best::before {{ content:"\\25C6\\00A0"; color:var(--rt); font-size:10px;
  vertical-align:2px; }}
figure {{ margin:18px 0 30px; border:1px solid var(--line); border-radius:8px; padding:14px 14px 10px; }}
figure.wide {{ padding-left:16px; padding-right:16px; }}
figcaption {{ font-size:14.5px; color:var(--muted); padding:4px 8px 4px; border-top:1px solid var(--line);
  margin-top:8px; padding-top:10px; }}
figcaption b {{ color:var(--ink); }}
.block-map {{ width:100%; height:auto; display:block; }}
blockquote {{ margin:0; padding:12px 18px; background:var(--soft); border-left:4px solid var(--rt);
  white-space:pre-wrap; overflow-wrap:anywhere; border-radius:0 6px 6px 0; }}
.samples {{ display:grid; grid-template-columns:repeat(auto-fit,minmax(320px,1fr)); gap:16px; }}
.samples h3 {{ font-size:14px; margin:0 0 6px; color:var(--muted); overflow-wrap:anywhere; }}
dl.terms {{ display:grid; grid-template-columns:minmax(130px,max-content) 1fr; gap:8px 22px; max-width:900px; }}
dl.terms dt {{ font-weight:600; }} dl.terms dd {{ margin:0; }}
footer {{ color:var(--muted); font-size:13px; padding-top:26px; padding-bottom:44px; overflow-wrap:anywhere; }}
@media (max-width:820px) {{ main, header > div, footer, nav ul {{ padding-left:18px; padding-right:18px; }}
  header h1 {{ font-size:30px; }} th, td {{ padding:8px; }} figure {{ padding:8px 6px; }}
  nav {{ position:static; }} .cards {{ grid-template-columns:1fr 1fr; }}
  dl.terms {{ grid-template-columns:1fr; gap:0; }} dl.terms dd {{ margin-bottom:10px; }} }}
@media print {{ nav {{ display:none; }} figure, .card {{ break-inside:avoid; }} }}
"""


@dataclass(frozen=True)
class Cell:
    """One number (or phrase) of a table, with the small text below it."""

    text: str
    note: str = ""
    best: bool = False
    prose: bool = False  # words, which may wrap


def document(title: str, body: str, script: str) -> str:
    """A complete page. `script` (plotly.js) is put into it, so that nothing is fetched."""
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f'<link rel="icon" href="data:,">\n<style>{CSS}</style>\n<script>{script}</script>\n</head>\n'
            f"<body>\n{body}\n</body>\n</html>\n")


def section(anchor: str, heading: str, lead: str, *parts: str) -> str:
    """A part of the page under its own heading; `lead` says in a sentence or two what it shows."""
    return (f'<section id="{anchor}" aria-labelledby="{anchor}-h"><h2 id="{anchor}-h">{escape(heading)}</h2>'
            f'<p>{escape(lead)}</p>{"".join(parts)}</section>')


def chart(chart_id: str, figure: go.Figure, label: str, caption: str) -> str:
    """A plotly figure that follows the width of the page, with what to look at below it."""
    html = pio.to_html(figure, full_html=False, include_plotlyjs=False, div_id=chart_id, default_width="100%",
                       default_height=f"{figure.layout.height}px",
                       config={"displayModeBar": False, "responsive": True, "plotlyServerURL": ""})
    return f'<figure aria-label="{escape(label)}">{html}{_caption(label, caption)}</figure>'


def drawing(svg: str, label: str, caption: str) -> str:
    """An SVG figure."""
    return f'<figure class="wide">{svg}{_caption(label, caption)}</figure>'


def _caption(label: str, caption: str) -> str:
    return f"<figcaption><b>{escape(label)}.</b> {escape(caption)}</figcaption>"


def table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A table with a header row and a header column; it scrolls by itself where the page is narrow."""
    prose = [False, *(cell.prose for cell in (rows[0][1] if rows else ()))]
    head = "".join(f'<th scope="col"{" class=prose" if words else ""}>{escape(column)}</th>'
                   for column, words in zip_longest(columns, prose))
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(cell) for cell in cells)}</tr>'
                   for name, cells in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
            f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def _cell(cell: Cell) -> str:
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    look = " class=best" if cell.best else " class=prose" if cell.prose else ""
    return f"<td{look}>{escape(cell.text)}{note}</td>"


def card(kind: str, heading: str, value: str, unit: str, note: str) -> str:
    """One headline number. `kind`: rt | be | kv, its colour."""
    return (f'<div class="card {kind}"><p class="what">{escape(heading)}</p><div class="value">{escape(value)} '
            f'<span class="unit">{escape(unit)}</span></div><p>{escape(note)}</p></div>')
