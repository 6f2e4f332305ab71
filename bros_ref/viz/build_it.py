"""Exercises whose answer is a part that the rest of a notebook builds on: checked against an oracle, then used.

The only state is which of the reader's functions and classes passed their check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

from bros_ref.viz.notebook import unanswered

SHORT = 400  # characters of two results that are shown as they are
_passed: dict[str, Any] = {}  # name -> the reader's function or class


def check_against(answer: Any, oracle: Callable[..., Any], cases: Mapping[str, tuple[Any, ...]], hint: str, *,
                  use: Callable[..., Any] | None = None, same: Callable[[Any, Any], object] | None = None) -> None:
    """Checks an exercise against an oracle, case by case, up to the first that fails. Prints "right" if none does;
    then `yours_if_right` keeps the answer.

    Args:
        answer: the reader's function, class or text.
        oracle: gives what is right from a case's arguments.
        cases: arguments by a description that tells the reader what is tried.
        use: called with the answer and a case's arguments instead of calling the answer.
        same: raises AssertionError unless its two arguments, got and wanted, agree (`torch.testing.assert_close`);
            None compares with ==.

    Raises:
        AssertionError: there is no answer yet, or a case fails or raises; it ends with the hint.
    """
    name = getattr(answer, "__name__", "")
    _passed.pop(name, None)
    if unanswered(answer):
        raise AssertionError(f"there is no answer yet: replace the ... above. Hint: {hint}")
    for number, (case, arguments) in enumerate(cases.items(), 1):
        which = f"case {number} of {len(cases)}, {case}"
        wanted = oracle(*arguments)
        try:
            got = answer(*arguments) if use is None else use(answer, *arguments)
        except Exception as error:
            raise AssertionError(f"{which}: {type(error).__name__}: {error} Hint: {hint}") from error
        try:
            if same is not None:
                same(got, wanted)
            elif got != wanted:
                raise AssertionError(f"got {got!r}, wanted {wanted!r}.")
        except (AssertionError, TypeError) as error:
            shown = "" if same is None else f" Got {got!r}, wanted {wanted!r}."
            raise AssertionError(f"{which}: {error}{shown if len(shown) <= SHORT else ''} Hint: {hint}") from None
    _passed[name] = answer
    print("right")


def yours_if_right(ours: Any) -> Any:
    """Decorates the answer to an exercise: the reader's own function or class of this name, if it passed
    `check_against`, else the one decorated. So a notebook goes on with what its reader has built."""
    return _passed.get(ours.__name__, ours)


def check_cases(stub: Callable[..., object], cases: Iterable[tuple[tuple[Any, ...], object]], hint: str,
                needs: Iterable[Callable[..., object]] = ()) -> None:
    """Checks an exercise against known results, up to the first that is wrong. If none is, it prints "right", and
    `yours_if_right` keeps the answer.

    Args:
        stub: the function to call: the reader's own, or one that uses `needs`.
        cases: (arguments, wanted result) pairs.
        hint: what to think of, if a result is wrong.
        needs: the reader's functions, where `stub` is none of them.

    Raises:
        AssertionError: a function is still the bare stub, or a result is wrong; the message has the case, what came
            out and what was wanted, and for lists the first entry that differs.
    """
    parts = list(needs) or [stub]
    for part in parts:
        _passed.pop(part.__name__, None)
    if bare := [part.__name__ for part in parts if unanswered(part)]:
        raise AssertionError(f"there is no answer yet: replace the ... in {', '.join(bare)}. Hint: {hint}")
    number = 0
    for number, (arguments, wanted) in enumerate(cases, 1):
        got = stub(*arguments)
        if got != wanted:
            shown = ", ".join(repr(argument) for argument in arguments)
            raise AssertionError(f"case {number}, {stub.__name__}({shown}): {_difference(got, wanted)}. Hint: {hint}")
    _passed.update({part.__name__: part for part in parts})
    print(f"right in {number} cases")


def _difference(got: object, wanted: object) -> str:
    if isinstance(got, list) and isinstance(wanted, list):
        for i, (mine, right) in enumerate(zip_longest(got, wanted, fillvalue="nothing")):
            if mine != right:
                return f"entry {i} is {mine!r}, wanted {right!r}"
    return f"got {got!r}, wanted {wanted!r}"


def toys_of(notebook: str, folder: str | Path = ".") -> ModuleType:
    """What an earlier notebook built by hand, with the answers of its exercises: runs its cells tagged `toy` or
    `answer`, in order, in a module of their own.

    Args:
        notebook: the file's name without its ending.
        folder: where it lies; a notebook runs in its own folder.

    Raises:
        FileNotFoundError: the notebook is not there.
    """
    path = Path(folder) / f"{notebook}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"this notebook uses what {path.name} built: both must lie in the same folder, and "
                                f"{path.resolve().parent} has none")
    module = ModuleType(notebook)
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if {"toy", "answer"} & set(cell["metadata"].get("tags", ())):
            exec(compile("".join(cell["source"]), path.name, "exec", dont_inherit=True), module.__dict__)
    return module
