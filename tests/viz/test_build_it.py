"""What the reader builds is compared with an oracle case by case, and goes on to be used if it is right."""

import contextlib
import json

import pytest

from bros_ref.viz.build_it import check_against, check_cases, toys_of, yours_if_right


def doubled(n):
    return 2 * n


CASES = {"nothing": (0,), "two": (2,), "three": (3,)}


def test_the_first_case_that_fails_is_shown():
    with pytest.raises(AssertionError, match=r"^case 3 of 3, three: got 9, wanted 6\. Hint: add$"):
        check_against(lambda n: n * n if n != 2 else 4, doubled, CASES, "add")
    with pytest.raises(AssertionError, match=r"^case 1 of 3, nothing: ZeroDivisionError: .*Hint: add$"):
        check_against(lambda n: 1 / n, doubled, CASES, "add")
    with pytest.raises(AssertionError, match=r"no answer yet.*Hint: add"):
        check_against(..., doubled, CASES, "add")


def test_a_comparison_of_ones_own_says_what_differs(capsys):
    def same(got, wanted):
        if abs(got - wanted) > 0.5:
            raise AssertionError(f"{abs(got - wanted)} apart.")

    check_against(lambda n: 2 * n + 0.1, doubled, CASES, "add", same=same)
    assert capsys.readouterr().out == "right\n"
    with pytest.raises(AssertionError, match=r"^case 2 of 3, two: 2 apart\. Got 6, wanted 4\. Hint: add$"):
        check_against(lambda n: 3 * n, doubled, CASES, "add", same=same)
    with pytest.raises(AssertionError, match=r"^case 1 of 3, nothing: 1{500} apart\. Hint: add$"):
        check_against(lambda n: int("1" * 500), doubled, CASES, "add", same=same)
    with pytest.raises(AssertionError, match=r"^case 1 of 3, nothing: .*NoneType.*Hint: add$"):
        check_against(lambda n: None if n == 0 else n, doubled, CASES, "add", same=same)


def test_a_right_answer_is_used_and_a_wrong_one_is_not():
    def ours(n):
        return 2 * n

    def attempt(answer):
        answer.__name__ = "ours"
        with contextlib.suppress(AssertionError):
            check_against(answer, doubled, CASES, "add")
        return yours_if_right(ours) is answer

    assert not attempt(lambda n: n)
    assert attempt(lambda n: n + n)
    assert not attempt(lambda n: n + 1), "an answer that was right and is changed to a wrong one is out again"
    assert yours_if_right(doubled) is doubled


def test_a_class_is_used_as_the_check_says():
    class Counter:
        def __init__(self):
            self.count = 0

        def add(self, n):
            self.count += n

    def life(kind, steps):
        one = kind()
        for step in steps:
            one.add(step)
        return one.count

    check_against(Counter, sum, {"three steps": ([1, 2, 3],)}, "add", use=life)

    @yours_if_right
    class Counter2:
        pass

    Counter2.__name__ = "Counter"
    assert yours_if_right(Counter2) is Counter


def test_a_check_of_cases_shows_the_first_that_is_wrong(capsys):
    cases = [((n,), n * n) for n in (0, 1, 2, 3)]
    check_cases(lambda n: n * n, cases, "multiply")
    assert capsys.readouterr().out == "right in 4 cases\n"

    def double(n):
        return n + n

    with pytest.raises(AssertionError, match=r"^case 2, double\(1\): got 2, wanted 1\. Hint: multiply$"):
        check_cases(double, cases, "multiply")
    with pytest.raises(AssertionError, match=r"entry 2 is 'nothing', wanted 5\."):
        check_cases(lambda: [3, 4], [((), [3, 4, 5])], "go on")
    with pytest.raises(AssertionError, match=r"got None, wanted \[3\]"):
        check_cases(lambda: print(), [((), [3])], "return it")


def test_a_check_of_cases_knows_a_stub_without_an_answer():
    def bare(one, *, other=3):
        ...

    def returns_none():
        return print()

    with pytest.raises(AssertionError, match=r"no answer yet: replace the \.\.\. in bare\. Hint: think"):
        check_cases(bare, [((1,), None)], "think")
    with pytest.raises(AssertionError, match=r"in bare\."):
        check_cases(lambda n: bare(n), [((1,), None)], "think", needs=[bare])
    check_cases(returns_none, [((), None)], "none is wanted")


def test_what_passed_its_cases_is_used_and_what_no_longer_does_is_not():
    def part(n):
        return n + n

    def same(n):
        return part(n)

    answer = part
    check_cases(same, [((2,), 4)], "double", needs=[part])

    def part(n):
        return 2 * n

    assert yours_if_right(part) is answer
    with pytest.raises(AssertionError, match="got 4, wanted 5"):
        check_cases(same, [((2,), 5)], "double", needs=[part])
    assert yours_if_right(part) is part
    check_cases(part, [((2,), 4)], "double")
    assert yours_if_right(answer) is part


def test_the_toys_of_another_notebook_are_its_tagged_cells(tmp_path):
    def cell(source, *tags):
        return {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source}

    one_class = "from dataclasses import dataclass\n@dataclass\nclass Toy:\n    size: int"
    cells = [cell(one_class, "toy"), cell(["X = 2\n", "def twice(n):\n", "    return X * n"], "toy"),
             cell("def answer(): ...", "exercise"),
             cell("def answer():\n    return twice(4)", "answer", "hide-input"), cell("raise SystemExit")]
    (tmp_path / "03_any.ipynb").write_text(json.dumps({"cells": cells}))
    assert toys_of("03_any", tmp_path).answer() == 8
    with pytest.raises(FileNotFoundError, match=r"04_none\.ipynb built: both must lie in the same folder"):
        toys_of("04_none", tmp_path)
