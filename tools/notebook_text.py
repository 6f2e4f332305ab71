"""A notebook as text, cell by cell, so that `git diff`, `git log -p` and `git show` can be read.

    git config diff.notebook.textconv "python tools/notebook_text.py"      (once; .gitattributes does the rest)

Sources are whole; of an output what a terminal would show, else its kinds and a checksum, so that a changed picture
is a changed line. Counts and metadata but for tags are left out: they say nothing about what a notebook says.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any


def as_text(notebook: dict[str, Any]) -> str:
    """The whole notebook."""
    return "\n".join(line for cell in notebook["cells"] for line in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> list[str]:
    tags = "".join(f" #{tag}" for tag in cell["metadata"].get("tags", ()))
    lines = [f"---- {cell['cell_type']}{tags}", *_joined(cell["source"]).splitlines()]
    for output in cell.get("outputs", ()):
        lines += [f"  > {line}" for line in _output(output)]
    return lines


def _output(output: dict[str, Any]) -> list[str]:
    if output["output_type"] == "stream":
        return _joined(output["text"]).splitlines()
    if output["output_type"] == "error":
        return [f"{output['ename']}: {output['evalue']}"]
    data = output["data"]
    lines = _joined(data.get("text/plain", "")).splitlines()
    return lines + [f"{kind} {zlib.crc32(_joined(data[kind]).encode()):08x}" for kind in sorted(data)
                    if kind != "text/plain"]


def _joined(text: Any) -> str:
    """A notebook keeps a text as a string or as a list of lines, and other data as JSON."""
    if isinstance(text, str):
        return text
    return "".join(text) if isinstance(text, list) else json.dumps(text, sort_keys=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/notebook_text.py NOTEBOOK.ipynb")
    print(as_text(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
