"""The README's picture is what its tool draws, small, and shows what it is there for."""

import importlib
import re
from pathlib import Path
from xml.etree import ElementTree

from bros_ref.viz.figures.kv_blocks import COPY_LABELS, FILLS

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_is_current_and_shows_every_kind_of_slot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("make_pictures")
    committed = tool.PICTURE.read_text(encoding="utf-8")
    assert tool.kv_blocks() == committed, "python tools/make_pictures.py"
    assert len(committed) < 60_000
    kinds = re.findall(r'fill="url\(#kv-(\w+)\)"><title>', committed)
    assert {"rt", "be", "over", "free", "restored", "moved"} <= set(kinds) <= FILLS.keys()
    tips = " ".join(title.text for title in ElementTree.fromstring(committed).iter("{http://www.w3.org/2000/svg}title"))
    assert all(label in tips for label in COPY_LABELS.values())
