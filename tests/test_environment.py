"""Which device a live run takes: asked for, by the environment, or what there is; a CPU never passes for a GPU."""

import pytest
import torch

from bros_ref.environment import compute_device


@pytest.mark.parametrize(("asked", "variable", "has_gpu", "expected"), [
    ("auto", None, False, "cpu"), ("auto", None, True, "cuda"), ("auto", "cpu", True, "cpu"),
    ("auto", "cuda", True, "cuda"), ("cpu", "cuda", True, "cpu"), ("cuda", "cpu", True, "cuda")])
def test_the_device_is_the_one_asked_for_else_the_variables_else_a_gpu(monkeypatch, asked, variable, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.delenv("BROS_REF_DEVICE", raising=False)
    if variable is not None:
        monkeypatch.setenv("BROS_REF_DEVICE", variable)
    assert compute_device(asked) == expected


@pytest.mark.parametrize(("asked", "variable", "message"), [
    ("cuda", None, "--device is cuda, but torch finds no CUDA device"),
    ("tpu", None, "--device must be auto, cpu or cuda"), ("auto", "cuda", "BROS_REF_DEVICE is cuda, but"),
    ("auto", "gpu", "BROS_REF_DEVICE must be auto, cpu or cuda")])
def test_a_device_that_is_not_there_is_refused(monkeypatch, asked, variable, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if variable is not None:
        monkeypatch.setenv("BROS_REF_DEVICE", variable)
    with pytest.raises(ValueError, match=message):
        compute_device(asked)
