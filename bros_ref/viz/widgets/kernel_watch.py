"""A line in a panel that tells the reader when the kernel is gone or does not answer.

A button of ipywidgets does nothing at all when its kernel is gone. JupyterLab knows when a kernel ends or restarts, and
the line appears at that moment. Other front ends know less, so this also asks: every click in the panel is followed by
a message that the kernel answers at once.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def kernel_script(name: str) -> str:
    """The ES module of an anywidget that waits for a kernel: what they share, and its own part."""
    folder = files("bros_ref.viz").joinpath("static")
    return "\n".join(folder.joinpath(one).read_text(encoding="utf-8") for one in ("silence.js", name))


def kernel_watch() -> Any:
    """A widget to put into a panel's VBox. Needs anywidget."""
    import anywidget
    import traitlets

    class KernelWatch(anywidget.AnyWidget):  # here, so that the package does without anywidget
        _esm = kernel_script("kernel_watch.js")
        asked = traitlets.Int().tag(sync=True)
        answered = traitlets.Int().tag(sync=True)

    watch = KernelWatch()
    watch.observe(lambda change: setattr(watch, "answered", change.new), "asked")
    return watch
