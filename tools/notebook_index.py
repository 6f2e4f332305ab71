"""The notebooks in a table: title, minutes, what is needed before; written into notebooks/README.md.

    python tools/notebook_index.py

Everything is read from the notebooks' own first cells, so a title or a time is written once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
BEGIN, END = "<!-- index: written by tools/notebook_index.py -->", "<!-- end of the index -->"


@dataclass(frozen=True)
class Entry:
    """One notebook, as its first cell presents it. `claim` is its sentence in Markdown."""

    path: Path
    title: str
    claim: str
    need: str
    minutes: int


def read_entry(path: Path) -> Entry:
    """
    Raises:
        ValueError: the first cell lacks the title, the claim, the need or the time.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join(cells[0]["source"])
    found = {"title": re.match(r"# (\d\d .+)", text),
             "claim": re.search(r"\*\*Claim\.\*\*\s+(.+?)\n\n", text, re.DOTALL),
             "need": re.search(r"\*\*Need:\*\* (.+?)\.?\s+\*\*Time:\*\*", text, re.DOTALL),
             "minutes": re.search(r"\*\*Time:\*\* (\d+) minutes", text)}
    if missing := [name for name, match in found.items() if match is None]:
        raise ValueError(f"{path.name}: no {', '.join(missing)} in its first cell; expected '# NN Title', "
                         "'**Claim.** ...', '**Need:** ... **Time:** N minutes'")
    title, claim, need, minutes = (" ".join(match[1].split()) for match in found.values() if match is not None)
    return Entry(path, title, claim, need, int(minutes))


def entries(folder: Path = FOLDER) -> list[Entry]:
    """All notebooks in order."""
    return [read_entry(path) for path in sorted(folder.glob("*.ipynb"))]


def table(found: list[Entry]) -> str:
    """As Markdown."""
    lines = ["| notebook | minutes | you need |", "|---|---|---|"]
    lines += [f"| [{entry.title}]({entry.path.name}) | {entry.minutes} | {entry.need} |" for entry in found]
    return "\n".join(lines)


def with_index(page: str, found: list[Entry]) -> str:
    """The page with the table between its markers rewritten.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"expected a line {BEGIN} and a line {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{table(found)}\n{END}", page)


if __name__ == "__main__":
    readme = FOLDER / "README.md"
    readme.write_text(with_index(readme.read_text(encoding="utf-8"), entries()), encoding="utf-8")
