"""Every way to compute a product gives the product; which way is used is decided per shape and number of rows."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.cpu import linear as module
from bros_ref.cpu.linear import ROWS, WAYS, FastestLinear, Trials, pack, possible_ways
from bros_ref.model.linear import linear


@given(rows=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 63, 64, 65]), outputs=st.integers(1, 17), inputs=st.integers(1, 9),
       biased=st.booleans(), seed=st.integers(0, 999))
def test_every_way_is_the_product(rows, outputs, inputs, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    b = torch.randn(outputs, generator=generator) if biased else None
    expected = (x[:, None] * w[None]).sum(-1)
    for way in possible_ways(w, rows):
        got = WAYS[way](x, pack(w) if way == "packed" else w)
        assert got.shape == (rows, outputs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, w, b), expected + (0 if b is None else b), rtol=1e-5, atol=1e-5)


def test_one_row_has_a_way_of_its_own_and_odd_weights_have_no_halves():
    even, odd = torch.zeros(4, 3), torch.zeros(5, 3)
    assert "twice" in possible_ways(even, 1)
    assert "twice" not in possible_ways(even, 2)
    assert "halves" in possible_ways(even, 2)
    assert "halves" not in possible_ways(odd, 2)
    assert "eighths" not in possible_ways(even, 2)
    assert "eighths" in possible_ways(torch.zeros(16, 3), 2)


@pytest.fixture
def timed_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "SMALLEST_WEIGHT", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)] + [torch.randn(4)]


@pytest.mark.parametrize("rows", sorted({count + more for count in ROWS for more in (0, 1)}))
def test_the_way_chosen_for_the_next_larger_number_of_rows_is_used(timed_weights, rows):
    asked = []

    def choose(weights, count):
        asked.append(count)
        return possible_ways(weights[0], count)[ROWS.index(count) % 6]

    fastest = FastestLinear(timed_weights, choose)
    assert asked == list(ROWS)
    x, b = torch.randn(rows, 4), torch.randn(8)
    for w in timed_weights[:3]:
        torch.testing.assert_close(fastest(x, w, b), linear(x, w, b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fastest(x, torch.ones(5, 4)), x @ torch.ones(4, 5))  # a weight it was not given


@pytest.mark.parametrize("way", [way for way in WAYS if way != "twice"])
def test_each_way_is_reached_and_adds_the_bias(timed_weights, way):
    if way not in possible_ways(timed_weights[0], 2):
        pytest.skip("torch has no oneDNN here")
    fastest = FastestLinear(timed_weights, lambda weights, rows: way)
    x, b = torch.randn(3, 4), torch.randn(8)
    for w in timed_weights[:3]:
        torch.testing.assert_close(fastest(x, w, b), linear(x, w, b), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fastest(x[:0], w, b), linear(x[:0], w, b))


def test_the_fastest_way_wins_and_a_plainer_one_where_it_is_close(timed_weights, monkeypatch):
    cost_s = {"plain": 1.0, "columns": 0.97, "halves": 0.5, "eighths": 2.0, "onednn": 0.49, "packed": 0.47,
              "twice": 2.0}
    now_s = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now_s[0])

    def spend(way):
        def product(x, w):
            now_s[0] += cost_s[way]
            return torch.zeros(len(x), 8)
        return product

    monkeypatch.setattr(module, "WAYS", {way: spend(way) for way in WAYS})
    trials = Trials(weight_bytes=0)
    assert trials.fastest(timed_weights[:3], 2) == "halves"  # onednn and packed lead it by too little
    cost_s["packed"] = 0.3
    assert trials.fastest(timed_weights[:3], 4) == "packed"
    cost_s["packed"] = 0.45  # by little, but the copies that four rows use are there
    assert trials.fastest(timed_weights[:3], 16) == "packed"
    assert trials.fastest([torch.zeros(16, 4)], 16) == "halves"
    assert Trials(weight_bytes=1 << 60).fastest(timed_weights[:3], 4) == "halves"  # no room for packed copies
    cost_s |= {"halves": 0.96, "onednn": 0.96, "packed": 0.96}
    assert trials.fastest(timed_weights[:3], 8) == "plain"


def test_what_was_timed_is_timed_once_per_cpu(timed_weights, monkeypatch, tmp_path):
    races = []
    monkeypatch.setattr(Trials, "_race", lambda self, weights, rows: races.append(rows) or "plain")
    FastestLinear(timed_weights)
    assert races == list(ROWS)
    FastestLinear(timed_weights)
    assert races == list(ROWS)
    monkeypatch.setattr(module, "cpu_model", lambda: "another")
    FastestLinear(timed_weights)
    assert races == 2 * list(ROWS)
    with monkeypatch.context() as patch:  # a version with another candidate must not take what was chosen without it
        patch.setattr(module, "WAYS", WAYS | {"new": WAYS["plain"]})
        FastestLinear(timed_weights)
        assert races == 3 * list(ROWS)
    for cached in (tmp_path / "bros_ref").glob("linear*.json"):
        cached.write_text(json.dumps({"another": {"8x4x1": "no such way"}}))
    FastestLinear(timed_weights)
    assert len(races) == 4 * len(ROWS)


def test_products_too_large_to_try_take_the_choice_of_fewer_rows(timed_weights, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_TRIAL", 4 * 8 * 4)
    races = []
    monkeypatch.setattr(Trials, "_race", lambda self, weights, rows: races.append(rows) or "plain")
    FastestLinear(timed_weights)
    assert races == [1, 2, 4]
