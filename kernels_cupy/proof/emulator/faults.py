"""What a kernel did wrong, and where: the exception, and the translation of an address in a library to file:line."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Index = tuple[int, int, int]
OWN_HEADERS = ("cuda_emulation.h", "cuda_fp16.h", "cuda_bf16.h")


@dataclass(frozen=True)
class Location:
    """A line of a kernel's text: innermost first, so `inlined` holds the callers it was inlined into."""

    file: str
    line: int
    inlined: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}"
        return text + "".join(f" (called at {file}:{line})" for file, line in self.inlined)


class KernelFault(Exception):
    """A kernel broke a rule that a GPU does not check. Tensors that the launch would have written are unchanged.

    Attributes:
        kernel: the function's name.
        what: the rule, e.g. "race", "out of bounds", "foreign slot", "uninitialised read", "divergent barrier".
        location: the line that broke it; `other` is the line it clashed with, if two are involved.
        block, thread: (x, y, z) of the thread that was caught.
    """

    def __init__(self, kernel: str, what: str, message: str, location: Location | None, other: Location | None,
                 block: Index, thread: Index) -> None:
        self.kernel, self.what, self.location, self.other = kernel, what, location, other
        self.block, self.thread = block, thread
        text = f"{what} in {kernel} at {location or 'an unknown line'}: thread {thread} of block {block} {message}"
        super().__init__(text + (f"; the other is at {other}" if other else ""))


@cache
def locate(library: Path, offset: int) -> Location | None:
    """The source line of a code offset in a library built with -g1; None if no addr2line is installed."""
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if tool is None or offset == 0:
        return None
    text = subprocess.run([tool, "-i", "-e", str(library), hex(offset)], capture_output=True, text=True, check=True)
    frames = []
    for frame in text.stdout.splitlines():
        name, _, line = frame.split(" (")[0].rpartition(":")
        if line.isdigit() and int(line) > 0 and Path(name).name not in OWN_HEADERS:
            frames.append((Path(name).name, int(line)))
    if not frames:
        return None
    return Location(*frames[0], inlined=tuple(frames[1:]))
