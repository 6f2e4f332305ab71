"""Exercises whose answer is a part that the rest of a notebook builds on: checked against an oracle, then used.

The only state is which of the reader's functions and classes passed their check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
