"""Helpers for notebooks: the package's own source on the page, the device in a line, checks that say what is wrong.

Notebooks import and never copy, so `show_source` prints what runs. Nothing here keeps state.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Protocol

from bros_ref.environment import compute_device, environment_stamp


class Loaded(Protocol):
    """What `device_line` asks of a loaded model."""

    @property
    def dtype(self) -> Any:
        """Of its weights and of the KV cache."""

    @property
    def backend(self) -> str:
        """Of its attention: torch, cupy or cpu-emulated."""


class Source:
    """Source text that a notebook shows as highlighted code, and a terminal as it is."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def __repr__(self) -> str:
        return f"# {self.name}\n{self.text}"

    def _repr_markdown_(self) -> str:
        return f"`{self.name}`\n```python\n{self.text}\n```"


def show_source(what: Callable[..., Any] | type, *, docstring: bool = False) -> Source:
    """The source of a function, method or class of the package, without its docstring unless asked for.

    Raises:
        ValueError: the object is not part of bros_ref.
    """
    if not what.__module__.startswith("bros_ref"):
        raise ValueError(f"show_source shows bros_ref's own code; {what.__qualname__} is from {what.__module__}")
    text = textwrap.dedent(inspect.getsource(what)).rstrip()
    if not docstring and (documented := inspect.getdoc(what)):
        quoted = text.find('"""')
        end = text.find('"""', quoted + 3)
        if 0 <= quoted < end and documented.split("\n", 1)[0][:20] in text[quoted:end]:
            text = text[:quoted].rstrip() + "\n" + text[end + 3:].lstrip("\n")
    path = what.__module__.replace(".", "/") + ".py"
    return Source(f"{path}: {what.__qualname__}", text)


def device() -> str:
    """Where this notebook's models run, "cpu" or "cuda"; rule and errors are those of `compute_device`."""
    return compute_device()


def device_line(loaded: Loaded | None = None) -> str:
    """Where the measurements of this notebook are made: a GPU where there is one, else the CPU, unless the variable
    BROS_REF_DEVICE says which. With a loaded model also its numbers' type and the backend that computes its attention.

    Raises:
        ValueError: see `compute_device`.
    """
    on_gpu, stamp = device() == "cuda", environment_stamp()
    line = f"measured on {stamp['gpu'] if on_gpu else stamp['cpu_model']}, torch {stamp['torch']}"
    if loaded is None:
        return line
    return f"{line}, {str(loaded.dtype).removeprefix('torch.')}, attention backend {loaded.backend}"


def unanswered(answer: object) -> bool:
    """Whether it is what the stub of an exercise leaves: None or `...`, lists of them, a function without a body, a
    class that has such a method, a text with a line that is `...`."""
    if isinstance(answer, list | tuple):
        return bool(answer) and all(unanswered(part) for part in answer)
    if isinstance(answer, str):
        return any(line.strip() == "..." for line in answer.splitlines())
    if isinstance(answer, type):
        return any(unanswered(member) for member in vars(answer).values() if inspect.isfunction(member))
    if inspect.isfunction(answer):
        return answer.__code__.co_code == _without_body.__code__.co_code
    return answer is None or answer is ...


def _without_body() -> None: ...


def check(answer: object, expected: object, hint: str) -> None:
    """Checks an exercise. Says what is wrong and gives the hint; prints "right" if nothing is. Where both are lists of
    one entry for each case, it shows the first case that is wrong, and what was wanted.

    Raises:
        AssertionError: there is no answer yet, or a wrong one.
    """
    if unanswered(answer) and answer != expected:
        raise AssertionError(f"there is no answer yet: replace the ... above. Hint: {hint}")
    if isinstance(answer, list) and isinstance(expected, list) and len(answer) == len(expected):
        for number, (got, wanted) in enumerate(zip(answer, expected, strict=True), 1):
            if got != wanted:
                raise AssertionError(f"case {number} of {len(expected)}: got {got!r}, wanted {wanted!r}. Hint: {hint}")
    if answer != expected:
        raise AssertionError(f"got {answer!r}, which is not what comes out. Hint: {hint}")
    print("right")
