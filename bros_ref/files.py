"""Writing files. The one place that does, so that every output is written the same way."""

from __future__ import annotations

import gzip
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, gzipped if the name ends in `.gz`; no time stamp inside, so equal text gives equal bytes."""
    data = text.encode()
    path.write_bytes(gzip.compress(data, compresslevel=6, mtime=0) if path.suffix == ".gz" else data)
