"""All notebooks as pages that open offline, with an index: out/book/index.html.

    python tools/make_book.py [FOLDER]

The committed outputs are shown, nothing is run. Players work in the page (they carry their data and scripts); what
needs a kernel shows the picture it left. Charts share one plotly.min.js beside the pages, formulas become MathML.
Invariant: no page loads anything from elsewhere.
"""

from __future__ import annotations

import re
import shutil
import sys
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import plotly.io
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from notebook_index import Entry, entries
from plotly.offline import get_plotlyjs
from pygments.formatters import HtmlFormatter

TITLE = "Serving two kinds of request on one model"
ROOT = Path(__file__).resolve().parents[1]
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(\S(?:[^$\n]*?\S)?)\$(?![0-9])", re.DOTALL)
# What a page shows of an output, first that it has.
SHOWN = ["text/html", "image/svg+xml", "image/png", "text/markdown", "text/plain"]


def make_book(folder: Path) -> list[Path]:
    """Writes the pages, the index first, and what they share."""
    found = entries()
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    (folder / "book.css").write_text(
        (ROOT / "tools" / "book.css").read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight"),
        encoding="utf-8")
    pages = [folder / "index.html"]
    pages[0].write_text(_index(found), encoding="utf-8")
    for place, entry in enumerate(found):
        pages.append(folder / f"{entry.path.stem}.html")
        pages[-1].write_text(_page(entry.title, _body(entry.path), _navigation(found, place)), encoding="utf-8")
    return pages


def _body(path: Path) -> str:
    """One notebook's cells as HTML."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        for output in cell.get("outputs", ()):
            if "data" in output:
                output.data = shown_data(output.data)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    body, _ = exporter.from_notebook_node(notebook)
    return body


def with_mathml(text: str) -> str:
    """Markdown with its $formulas$ and $$displayed formulas$$ as MathML, which browsers draw by themselves: a page that
    opens offline needs no MathJax. Code is left alone.

    Raises:
        ValueError: a formula has a command that is not translated.
    """
    pieces = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(piece if piece.startswith("`") else FORMULA.sub(_mathml, piece) for piece in pieces)


def _mathml(match: re.Match[str]) -> str:
    shown, inline = match[1], match[2]
    formula: str = convert(shown or inline, display="block" if shown else "inline")
    if "\\" in formula:
        raise ValueError(f"the formula {shown or inline!r} has a command that latex2mathml does not know")
    return formula


def shown_data(data: dict[str, Any]) -> dict[str, Any]:
    """The one form of an output that a page shows: a chart drawn by the shared plotly.min.js, else the first of SHOWN.

    Raises:
        ValueError: it has no form that a page can show.
    """
    if PLOTLY in data:
        figure = {key: data[PLOTLY][key] for key in ("data", "layout")}
        return {"text/html": plotly.io.to_html(figure, include_plotlyjs=False, full_html=False,
                                               config={"displaylogo": False, "responsive": True}, validate=False)}
    kind = next((kind for kind in SHOWN if kind in data), None)
    if kind is None:
        raise ValueError(f"an output has none of {', '.join(SHOWN)}, {PLOTLY}: it has {', '.join(data)}")
    if kind == "image/svg+xml":  # in the page, not as an image: its text stays text, its tooltips work
        return {"text/html": data[kind]}
    if kind == "text/html" and WIDGET in data:
        return {kind: f"{data[kind]}<p><em>The buttons work in JupyterLab; this is the picture they left.</em></p>"}
    return {kind: data[kind]}


def _index(found: list[Entry]) -> str:
    rows = "".join(f'<tr><td><a href="{entry.path.stem}.html">{escape(entry.title)}</a><br>{_plain(entry.claim)}</td>'
                   f"<td>{entry.minutes}</td><td>{_plain(entry.need)}</td></tr>" for entry in found)
    body = (f"<h1>{TITLE}</h1><p>Step through a hybrid serving system: each notebook makes a claim, builds a part, "
            "shows it, measures it and breaks it. Here they are as pages, with the outputs of their last run; all "
            f"together they take {sum(entry.minutes for entry in found)} minutes. <code>make lab</code> opens them to "
            "run and change.</p><table><thead><tr><th>notebook</th><th>minutes</th><th>you need</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>")
    return _page(TITLE, body, "")


def _plain(markdown: str) -> str:
    """A sentence of Markdown without its marks."""
    return escape(markdown.replace("*", "").replace("`", ""))


def _navigation(found: list[Entry], place: int) -> str:
    links = [f'<a href="{found[i].path.stem}.html">{arrow}{escape(found[i].title)}{end}</a>' if 0 <= i < len(found)
             else "<span></span>" for i, arrow, end in ((place - 1, "← ", ""), (place + 1, "", " →"))]
    return "".join(links)


def _page(title: str, body: str, navigation: str) -> str:
    chart = '<script src="plotly.min.js"></script>' if "plotly-graph-div" in body else ""
    above, below = (f'<nav aria-label="{where} the page">{navigation}</nav>' if navigation else ""
                    for where in ("above", "below"))
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · bros_ref</title>'
            f'<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="book.css">{chart}</head>'
            f'<body><header><div><a href="index.html">bros_ref, step by step</a></div></header>{above}'
            f"<main>{body}</main>{below}</body></html>\n")


if __name__ == "__main__":
    written = make_book(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "book")
    print(f"{len(written)} pages: open {written[0]}")
