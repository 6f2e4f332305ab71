"""What every notebook leans on: the device it asks for, the checks of its exercises, the source it shows."""

import pytest

from bros_ref.request import Request
from bros_ref.viz import notebook
from bros_ref.viz.notebook import check, device, device_line, show_source


def test_the_line_names_the_device_that_models_get(monkeypatch):
    monkeypatch.setattr(notebook, "environment_stamp", lambda: {"gpu": "a GPU", "cpu_model": "a CPU", "torch": "2"})
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(notebook, "compute_device", lambda name=name: name)
        assert device() == name
        assert device_line() == f"measured on {'a GPU' if name == 'cuda' else 'a CPU'}, torch 2"


def test_a_check_says_what_is_wrong(capsys):
    check([1, 2], [1, 2], "count")
    assert capsys.readouterr().out == "right\n"
    with pytest.raises(AssertionError, match=r"no answer yet.*Hint: count"):
        check(..., 3, "count")
    with pytest.raises(AssertionError, match=r"got 4, .*Hint: count"):
        check(4, 3, "count")


def test_source_is_the_packages_own_without_its_docstring():
    shown = show_source(Request)
    assert shown.name == "bros_ref/request.py: Request"
    assert "num_computed_tokens" in shown.text
    assert Request.__doc__ not in shown.text
    with pytest.raises(ValueError, match="bros_ref's own"):
        show_source(pytest.fixture)
