"""How many threads are used: as many as were asked for, or as a trial beside the machine's other work says."""

import pytest
import torch

from bros_ref.cpu import threads as module
from bros_ref.cpu.threads import compute_threads


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
    assert calls == [1, 4, 7, 8] * module.THREAD_ROUNDS


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
