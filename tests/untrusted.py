"""What JupyterLab leaves of an output's HTML where the notebook is not trusted, as tests/browser saw it: no scripts, no
SVG elements (but the text in them), no `hidden` and no data attributes; inline styles stay."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from xml.etree import ElementTree

import html5lib

OPERATED = {"button", "input", "select", "canvas"}
DROPPED = {"script", "style"}


@dataclass
class Seen:
    """What a reader sees of it."""

    text: str = ""
    images: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)


def seen_untrusted(html: str) -> Seen:
    """The text, the images' addresses and the dead controls that are not hidden."""
    seen = Seen()
    _look(html5lib.parse(html, namespaceHTMLElements=False), seen)
    return seen


def _look(element: ElementTree.Element, seen: Seen) -> None:
    name = str(element.tag).rsplit("}", 1)[-1]
    if name not in DROPPED and "display:none" not in element.get("style", ""):
        seen.text += element.text or ""
        if name == "img":
            seen.images.append(element.get("src", ""))
        if name in OPERATED:
            seen.controls.append(name)
        for child in element:
            _look(child, seen)
    seen.text += element.tail or ""


def drawn(address: str) -> str:
    """The <svg> element in an image's address."""
    kind, _, image = address.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(image).decode()


def saved_still(bundle: dict[str, str]) -> str:
    """The one picture that a reader sees of a widget before its scripts run."""
    [image] = seen_untrusted(bundle["text/html"]).images
    return drawn(image)
