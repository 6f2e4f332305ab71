"""What every notebook leans on: the device it asks for, the checks of its exercises, the source it shows."""

from types import SimpleNamespace

import pytest

from bros_ref.request import Request
from bros_ref.viz import notebook
from bros_ref.viz.notebook import check, device, device_line, show_source, unanswered


def test_the_line_names_the_device_that_models_get(monkeypatch):
    monkeypatch.setattr(notebook, "environment_stamp", lambda: {"gpu": "a GPU", "cpu_model": "a CPU", "torch": "2"})
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(notebook, "compute_device", lambda name=name: name)
        assert device() == name
        line = f"measured on {'a GPU' if name == 'cuda' else 'a CPU'}, torch 2"
        assert device_line() == line
        loaded = SimpleNamespace(dtype="torch.float16", backend="cupy")
        assert device_line(loaded) == f"{line}, float16, attention backend cupy"


def test_a_check_says_what_is_wrong(capsys):
    check([1, 2], [1, 2], "count")
    assert capsys.readouterr().out == "right\n"
    with pytest.raises(AssertionError, match=r"no answer yet.*Hint: count"):
        check(..., 3, "count")
    with pytest.raises(AssertionError, match=r"got 4, .*Hint: count"):
        check(4, 3, "count")
    with pytest.raises(AssertionError, match=r"^case 2 of 3: got 0, wanted 4\. Hint: count$"):
        check([2, 0, 0], [2, 4, 6], "count")
    with pytest.raises(AssertionError, match=r"got \[1\], which is not"):
        check([1], [1, 2], "count")


@pytest.mark.parametrize("stub", [None, ..., [None, None], [[None], ...], (None, ...)])
def test_a_check_knows_a_bare_stub(stub, capsys):
    with pytest.raises(AssertionError, match="no answer yet"):
        check(stub, [1, 2], "count")
    check([None], [None], "an answer may be None")
    assert not unanswered([])
    assert not unanswered([None, 1])


def test_a_function_or_class_without_bodies_is_a_stub():
    def stub(a, b=3, *more):  # a comment is no body
        ...

    def answer(a):
        return None if a else a

    class Stub:
        def __init__(self, size): ...

        def free(self, name): ...

    class Begun:
        def __init__(self, size):
            self.size = size

        def free(self, name): ...

    class Done(Begun):
        def free(self, name):
            del self.size

    assert unanswered(stub)
    assert unanswered(Stub)
    assert unanswered(Begun)
    assert not unanswered(answer)
    assert not unanswered(Done)
    assert unanswered("float sum = 0;\n    ...\n")
    assert not unanswered("float sum = 0; // ... and more")


def test_source_is_the_packages_own_without_its_docstring():
    shown = show_source(Request)
    assert shown.name == "bros_ref/request.py: Request"
    assert "num_computed_tokens" in shown.text
    assert Request.__doc__ not in shown.text
    with pytest.raises(ValueError, match="bros_ref's own"):
        show_source(pytest.fixture)
