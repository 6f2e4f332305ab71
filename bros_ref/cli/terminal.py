"""What goes to a terminal: never lost because of its encoding, never able to steer it.

Standard output and error show a character that their encoding lacks as an escape (`\\xe9`), so an answer is printed as
far as it can be. Control characters in text from outside (an answer, a name in a file) could move the cursor or clear
the screen, so a terminal is shown their escapes; a file or a pipe gets the text as it is.
"""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from typing import IO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all of Unicode's category Cc but tab and newline


def prepare_streams() -> None:
    """Lets standard output and error print any text. One that is closed is replaced by one that drops everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str, stream: IO[str]) -> str:
    """The text as it may be written to a stream: with escapes for control characters if that is a terminal."""
    if not stream.isatty():
        return text
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def abandon_stdout() -> None:
    """Drops what standard output still holds: after an error there, the interpreter's last flush would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
