"""Which device a live run takes: asked for, by the environment, or what there is; a CPU never passes for a GPU.

And how many threads: asked for, by the environment, or what a trial beside the machine's other work says."""

import pytest
import torch

from bros_ref import environment
from bros_ref.environment import compute_device, compute_threads


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


@pytest.fixture
def eight_threads(monkeypatch):
    """torch would use eight; what the trial sets is recorded and has no effect."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    settings = []
    monkeypatch.setattr(torch, "set_num_threads", settings.append)
    return settings


@pytest.mark.parametrize(("cost", "expected"), [
    ({1: 8.0, 4: 2.0, 7: 1.2, 8: 1.0}, 8),  # quiet
    ({1: 8.0, 4: 2.0, 7: 1.2, 8: 3.0}, 7),  # a neighbour on one core
    ({1: 1.0, 4: 3.0, 7: 3.0, 8: 3.0}, 1),  # on nearly all of them
    ({1: 1.1, 4: 1.0, 7: 1.1, 8: 1.1}, 8)])  # reading gains nothing from more, prefills do
def test_the_most_threads_that_are_worth_it_are_used(eight_threads, cost, expected):
    assert compute_threads(0, cost.__getitem__) == expected
    assert eight_threads == [8], "the number is put back"


def test_one_slow_round_decides_nothing(eight_threads):
    calls = []

    def seconds(count):
        calls.append(count)
        return 50.0 if len(calls) < 5 and count == 8 else {1: 8.0, 4: 2.0, 7: 1.5, 8: 1.0}[count]

    assert compute_threads(0, seconds) == 8
    assert calls == [1, 4, 7, 8] * environment.THREAD_ROUNDS


def test_threads_that_were_asked_for_are_not_tried(eight_threads, monkeypatch):
    assert compute_threads(3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert compute_threads() == 8
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert compute_threads() == 1
    assert eight_threads == []


def test_the_trial_itself_runs_with_each_number_and_leaves_torch_as_it_was(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert compute_threads() in (1, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
