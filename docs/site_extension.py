"""What the project adds to Sphinx: it collects the pages, draws the notebooks' charts, and writes formulas as MathML.

The source folder that Sphinx gets is empty: guides, notebooks and the files of the repository that are pages too are
copied into it with their links changed, so that nothing generated lies in docs/. A page loads nothing from elsewhere:
charts share one plotly.min.js, browsers draw MathML by themselves, and players carry their data and scripts.
"""

from __future__ import annotations

import os.path
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import plotly.io
from docutils import nodes
from latex2mathml.converter import convert
from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
# In the side bar; the others follow.
FIRST = ["architecture", "results", "paper-and-ours", "server", "replicas", "vllm", "testing", "faq"]
GUIDES = sorted((path.stem for path in (ROOT / "docs").glob("*.md")),
                key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md", "notebooks/README.md": "book/index.md", "kernels_cupy/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    **{f"docs/{name}.md": f"{name}.md" for name in GUIDES},
    **{f"notebooks/{path.name}": f"book/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))},
}
BELOW = {  # page -> the pages that the side bar lists below it
    "index.md": ["book/index", *GUIDES, "kernels", "api/bros_ref/modules", "api/kernels_cupy/modules", "contributing",
                 "changelog"],
    "book/index.md": [Path(page).stem for page in PAGES.values() if page.endswith(".ipynb")],
}
PLOTLY = "application/vnd.plotly.v1+json"
SHOWN = {"text/html", "image/svg+xml", "image/png", "text/markdown", "text/plain"}
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")  # [text](relative/path#anchor)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", _collect)
    app.connect("autodoc-process-docstring", _with_blocks)
    app.connect("html-page-context", _with_charts)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# -- pages ------------------------------------------------------------------------------------------------------------


def _collect(app: Sphinx) -> None:
    """Fills the source folder."""
    for source, page in PAGES.items():
        if page.endswith(".ipynb"):
            notebook = nbformat.read(ROOT / source, as_version=4)
            _write(app.srcdir / page, nbformat.writes(shown_notebook(notebook)))
            continue
        text = site_links((ROOT / source).read_text(encoding="utf-8"), source, app.srcdir)
        if page in BELOW:
            text += "\n".join(["", "```{toctree}", ":hidden:", ":maxdepth: 2", "", *BELOW[page], "```", ""])
        _write(app.srcdir / page, text)
    _write(Path(app.outdir) / "_static" / "plotly.min.js", get_plotlyjs())


def _write(path: Path, text: str) -> None:
    """Leaves a file that is as it should be alone, so that Sphinx does not read it again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def site_links(text: str, source: str, folder: Path) -> str:
    """A page's text with the relative links of a file of the repository turned into links of the site. Files that are
    no pages are copied into `folder`/files.

    Raises:
        FileNotFoundError: a link leads nowhere.
    """

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(Path(source).parent / match[2])
        if target not in PAGES:
            (folder / "files" / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / target, folder / "files" / target)
        place = PAGES.get(target, f"files/{target}")
        return match[1] + os.path.relpath(place, Path(PAGES[source]).parent) + match[3]

    return LINK.sub(moved, text)


def _with_blocks(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Shows what a module's docstring indents as it is written, and sets its lists off by the empty line they need. A
    vertical bar is no mark-up in any docstring."""
    if what != "module":
        lines[:] = [_without_substitutions(line) for line in lines]
        return
    shown: list[str] = []
    for line in lines:
        before, above = next((line for line in reversed(shown) if line), ""), shown[-1] if shown else ""
        block_ends = above.startswith("    ") and line and not line.startswith("    ")
        list_starts = line.startswith("- ") and above and not above.startswith(("- ", "  "))
        if line.startswith("    ") and not before.startswith("    "):
            shown += ["", "::", ""]
        elif block_ends or list_starts:
            shown.append("")
        shown.append(line if line.startswith("    ") else _without_substitutions(line))
    lines[:] = shown


def _without_substitutions(line: str) -> str:
    return re.sub(r"`[^`]*`|\|", lambda match: match[0] if match[0] != "|" else r"\|", line)


# -- notebooks --------------------------------------------------------------------------------------------------------


def shown_notebook(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with outputs in forms that a page can show."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "data" in output:
                output.data = nbformat.from_dict(shown_data(output.data))
    return notebook


def shown_data(data: dict[str, Any]) -> dict[str, Any]:
    """An output as a page shows it: a chart is drawn by plotly.min.js, a picture is part of the page.

    Raises:
        ValueError: it has no form that a page can show.
    """
    if PLOTLY in data:
        figure = {key: data[PLOTLY][key] for key in ("data", "layout")}
        return {"text/html": plotly.io.to_html(figure, include_plotlyjs=False, full_html=False,
                                               config={"displaylogo": False, "responsive": True}, validate=False)}
    shown = {kind: value for kind, value in data.items() if kind in SHOWN}
    if not shown:
        raise ValueError(f"an output has none of {', '.join(sorted(SHOWN))}, {PLOTLY}: it has {', '.join(data)}")
    if "text/html" not in shown and "image/svg+xml" in shown:  # in the page, not as an image: its tooltips work
        return {"text/html": shown["image/svg+xml"]}
    return shown


def _with_charts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    if "plotly-graph-div" in context.get("body", ""):  # in the head: the charts' own scripts run as the page is read
        context["metatags"] += f'<script src="{context["pathto"]("_static/plotly.min.js", 1)}"></script>'


# -- formulas ---------------------------------------------------------------------------------------------------------


def mathml(formula: str, display: str) -> str:
    """A formula as MathML, "inline" or "block".

    Raises:
        ValueError: it has a command that is not translated.
    """
    translated: str = convert(formula, display=display)
    if "\\" in translated:
        raise ValueError(f"the formula {formula!r} has a command that latex2mathml does not know")
    return translated


def _inline_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block_math(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(mathml(node.astext(), "block"))
    raise nodes.SkipNode
