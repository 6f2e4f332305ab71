"""Gives each chart of a notebook a picture, which is what a page shows where plotly's script does not run: GitHub, and
a JupyterLab without plotly's extension. JupyterLab and the site prefer the chart itself.

Chromium draws the pictures, so they look as the charts do. Where it is not installed, charts stay as they are. The
picture is an <img> with a text of its own, because plotly's extension puts an `image/png` in the place of its chart.
"""

from __future__ import annotations

import shutil
import struct
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import nbformat
import numpy as np

CHART, PICTURE = "application/vnd.plotly.v1+json", "text/html"
WIDTH_PX, HEIGHT_PX = 700, 450  # the height of a chart that gives none
LEVELS, EXACT = 6, 40  # 6 levels of each colour, and the 40 most frequent colours as they are: a pixel is one byte
PIXELS = """async ([figure, width, height]) => {
  const image = new Image();
  image.src = await Plotly.toImage(figure, {format: 'png', width, height});
  await image.decode();
  const context = Object.assign(document.createElement('canvas'), {width, height}).getContext('2d');
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, width, height).data;
  let text = '';
  for (let i = 0; i < data.length; i += 8192) text += String.fromCharCode(...data.subarray(i, i + 8192));
  return btoa(text);
}"""


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
    """A chart in a line: its title, its axes and what is drawn."""
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
            size = WIDTH_PX, int(figure["layout"].get("height", HEIGHT_PX))
            shown = {"data": figure["data"], "layout": figure["layout"]}
            rgba = np.frombuffer(b64decode(page.evaluate(PIXELS, [shown, *size])), np.uint8)
            pictures.append(png(rgba.reshape(size[1], size[0], 4)[..., :3]))
        browser.close()
    return pictures


def png(rgb: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """[height, width, 3] as a PNG with a palette, which takes a third of the bytes. A chart has few colours; those
    beyond the EXACT most frequent ones are on the edges of letters, and get the nearest of LEVELS ** 3."""
    height, width, _ = rgb.shape
    ramp = np.rint(np.arange(LEVELS) * 255 / (LEVELS - 1)).astype(np.uint8)
    places = np.rint(rgb / 255 * (LEVELS - 1)).astype(np.uint8) @ np.array([LEVELS**2, LEVELS, 1], np.uint8)
    colours, counts = np.unique(rgb.reshape(-1, 3), axis=0, return_counts=True)
    frequent = colours[np.argsort(-counts, kind="stable")[:EXACT]]
    for i, colour in enumerate(frequent):
        places[(rgb == colour).all(axis=-1)] = LEVELS**3 + i
    rows = np.pad(places, ((0, 0), (1, 0)))  # each row begins with its filter, 0: none
    palette = np.stack(np.meshgrid(ramp, ramp, ramp, indexing="ij"), axis=-1).tobytes() + frequent.tobytes()
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0), b"PLTE": palette,
             b"IDAT": zlib.compress(rows.tobytes(), 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items())
