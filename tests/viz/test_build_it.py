"""What the reader builds is compared with an oracle case by case, and goes on to be used if it is right."""

import contextlib

import pytest

from bros_ref.viz.build_it import check_against, yours_if_right


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
