"""Gives each chart of a notebook a picture, which is what a page shows where plotly's script does not run: GitHub, and
a JupyterLab without plotly's extension. JupyterLab and the site prefer the chart itself.

Chromium draws the pictures, so they look as the charts do. Where it is not installed, charts stay as they are. The
picture is an <img> with a text of its own, because plotly's extension puts an `image/png` in the place of its chart.
"""

from __future__ import annotations

import shutil
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import Any

import nbformat

CHART, PICTURE = "application/vnd.plotly.v1+json", "text/html"
WIDTH_PX, HEIGHT_PX = 700, 450  # the height of a chart that gives none
COLOURS = 256  # a chart has few, so a pixel is one byte: a third of the file


def add_pictures(notebook: nbformat.NotebookNode) -> bool:
    """Adds the pictures to the outputs that have a chart. False: it has charts, and nothing here can draw them."""
    charts = [output.data for cell in notebook.cells for output in cell.get("outputs", ())
              if CHART in output.get("data", {})]
    if not charts:
        return True
    pictures = drawn([chart[CHART] for chart in charts])
    for chart, picture in zip(charts, pictures, strict=False):
        chart[PICTURE] = (f'<img alt="{escape(words_of(chart[CHART]))}" style="max-width:100%" '
                          f'src="data:image/png;base64,{b64encode(picture).decode()}">')
    return bool(pictures)


def words_of(figure: Mapping[str, Any]) -> str:
    """A chart in one line: its title, its axes and what is drawn."""
    layout = figure["layout"]
    title, x, y = (part.get("title", {}).get("text", "") for part in
                   (layout, layout.get("xaxis", {}), layout.get("yaxis", {})))
    names = dict.fromkeys(trace["name"] for trace in figure["data"] if trace.get("name"))
    return ": ".join(filter(None, (title or "chart", " by ".join(filter(None, (y, x))), ", ".join(names))))


def drawn(figures: Sequence[dict[str, Any]]) -> list[bytes]:
    """Each figure as a PNG, WIDTH_PX wide; nothing if there is no Chromium or no playwright."""
    path = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return []
    if path is None:
        return []
    from plotly.offline import get_plotlyjs

    pictures = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.add_script_tag(content=get_plotlyjs())
        for figure in figures:
            size = {"format": "png", "width": WIDTH_PX, "height": int(figure["layout"].get("height", HEIGHT_PX))}
            shown = {"data": figure["data"], "layout": figure["layout"]}
            url = page.evaluate("([figure, size]) => Plotly.toImage(figure, size)", [shown, size])
            pictures.append(small(b64decode(url.partition(",")[2])))
        browser.close()
    return pictures


def small(png: bytes) -> bytes:
    """The same picture with a palette of at most COLOURS."""
    from PIL import Image

    to = BytesIO()
    Image.open(BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(to, "PNG", optimize=True)
    return to.getvalue()
