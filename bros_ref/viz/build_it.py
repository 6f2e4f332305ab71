"""Exercises whose answers are used in the rest of a notebook: each is checked against an oracle first.

The only state is the set of the reader's functions and classes that passed their check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

from bros_ref.viz.notebook import unanswered

SHORT = 400  # characters up to which two results are shown in full
_passed: dict[str, Any] = {}  # name -> the reader's function or class


def check_against(answer: Any, oracle: Callable[..., Any], cases: Mapping[str, tuple[Any, ...]], hint: str, *,
                  use: Callable[..., Any] | None = None, same: Callable[[Any, Any], object] | None = None) -> None:
    """Checks an exercise against an oracle, case by case, and stops at the first failure. If there is none, prints
    "right", and `yours_if_right` will use the answer.

    Args:
        answer: the reader's function, class or text.
        oracle: computes the right result from a case's arguments.
        cases: a description for the reader -> the arguments of the case.
        use: called with the answer and a case's arguments; None: the answer itself is called.
        same: raises AssertionError unless its two arguments, got and wanted, agree (`torch.testing.assert_close`);
            None compares with ==.

    Raises:
        AssertionError: there is no answer yet, or a case fails or raises; the message ends with the hint.
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
    """Decorator for the answer to an exercise. Returns the reader's own function or class of the same name if it passed
    its check, and otherwise `ours`. The notebook therefore continues with the reader's code where possible."""
    return _passed.get(ours.__name__, ours)


def check_cases(stub: Callable[..., object], cases: Iterable[tuple[tuple[Any, ...], object]], hint: str,
                needs: Iterable[Callable[..., object]] = ()) -> None:
    """Checks an exercise against known results, and stops at the first wrong one. If there is none, prints "right", and
    `yours_if_right` will use the answer.

    Args:
        stub: the function to call: the reader's own, or one that uses `needs`.
        cases: (arguments, wanted result) pairs.
        hint: shown if a result is wrong.
        needs: the reader's functions, if `stub` is not one of them.

    Raises:
        AssertionError: a function is still the bare stub, or a result is wrong; the message has the case, the actual
            and the wanted result, and for lists the first entry that differs.
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
    """The code that an earlier notebook built by hand, with the answers to its exercises. Runs its cells tagged `toy`
    or `answer` in order, in a new module.

    Args:
        notebook: the file's name without its ending.
        folder: the folder that contains it; a notebook runs in its own folder.

    Raises:
        FileNotFoundError: the folder does not contain the notebook.
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
