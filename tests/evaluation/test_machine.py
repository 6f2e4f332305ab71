"""Times are taken around work that is finished, sizes follow what the device can do, and a wrong pass has no time."""

from dataclasses import replace

import pytest
import torch

from bros_ref.engine.build import load_model
from bros_ref.evaluation.bench import machine, passes
from bros_ref.evaluation.bench.machine import Roof, best_seconds, measured


def test_a_gpu_is_idle_when_the_clock_starts_and_when_it_stops(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(f"wait for {device}"))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: seen.append("clock") or float(len(seen)))
    best_seconds(lambda: seen.append("work"), "cuda", rounds=2)
    one = ["wait for cuda", "clock", "work", "wait for cuda", "clock"]
    assert seen == ["work", *one, *one], "a call to warm up, then the rounds"


def test_the_fastest_round_counts_and_a_cpu_needs_no_waiting(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("there is no GPU"))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert best_seconds(lambda: None, rounds=3) == 2.0
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        best_seconds(lambda: None, rounds=0)


@pytest.mark.parametrize(("cost", "reached"), [(1e-4, [1, 2, 8, 32, 2048]), (0.02, [1, 2, 8, 32]), (9.0, [1, 2, 8])])
def test_sizes_grow_until_the_next_would_take_too_long(cost, reached):
    taken = measured((2048, 1, 8, 2, 32), lambda size: cost * size, longest_s=1.0)
    assert list(taken) == reached
    assert taken[8] == cost * 8


def test_no_size_is_refused():
    with pytest.raises(ValueError, match="at least one size"):
        measured((), lambda size: 1.0, longest_s=1.0)
    with pytest.raises(ValueError, match="always 0"):
        measured((1,), lambda size: 1.0, longest_s=1.0, always=0)


def test_the_roof_bends_at_its_ridge():
    roof = Roof(flops_per_s=100.0, bytes_per_s=20.0)
    assert roof.ridge == 5.0
    assert [roof.limit(x) for x in (1.0, 5.0, 50.0)] == [20.0, 100.0, 100.0]


def test_rates_are_work_over_time(monkeypatch):
    calls = []

    def taking(work, device, rounds):
        calls.append((str(device), rounds))
        return 0.001 * 8 ** len(calls)  # 8, 64 ms

    monkeypatch.setattr(machine, "best_seconds", taking)
    assert machine.matrix_flops_per_s() == pytest.approx(2 * 1024**3 / 0.008), "long enough at once"
    monkeypatch.setattr(machine, "LONG_ENOUGH_S", 0.1)
    monkeypatch.setattr(machine, "LARGEST_MATRIX", 2048)
    calls.clear()
    assert machine.matrix_flops_per_s() == pytest.approx(max(2 * 1024**3 / 0.008, 2 * 2048**3 / 0.064))
    calls.clear()
    assert machine.read_bytes_per_s(4096) == pytest.approx(4096 / 0.008)


@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 17), (5, 16), (16, 16)])
def test_a_checked_pass_computes_logits(new, context):
    logits = passes.checked_pass(load_model("smollm2", "cpu"), new, context)()
    assert logits.shape == (1, load_model("smollm2", "cpu").config.vocab_size)
    assert logits.isfinite().all()


def test_a_wrong_pass_is_not_timed(monkeypatch):
    loaded = load_model("smollm2", "cpu")
    right = passes.attention_backend(loaded.backend)
    for damage in (lambda out: out + 0.01, lambda out: out.fill_(torch.nan)):
        def wrong(*arguments, damage=damage):
            return damage(right(*arguments))

        monkeypatch.setattr(passes, "attention_backend", lambda name, device, wrong=wrong: wrong)
        with pytest.raises(ArithmeticError, match=r"3 new of 9.*backend torch.*not timed"):
            passes.checked_pass(loaded, 3, 9)
    for new, context in ((0, 5), (6, 5), (1, loaded.config.max_context_tokens + 1)):
        with pytest.raises(ValueError, match="need 1 <= new <= context"):
            passes.checked_pass(replace(loaded), new, context)
