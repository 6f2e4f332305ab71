"""Intervals are Student's, differences are paired, ratios of means survive a seed near zero."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.evaluation.statistics import METRICS, interval, interval_rows, paired_difference, paired_ratio

T95 = {2: 12.706, 3: 4.303, 5: 2.776, 6: 2.571, 10: 2.262, 31: 2.042}  # printed tables, by number of samples


@pytest.mark.parametrize("count", T95)
def test_intervals_are_students(count):
    samples = [float(value) for value in range(count)]
    mean, half = interval(samples)
    assert mean == statistics.fmean(samples)
    assert half == pytest.approx(T95[count] * statistics.stdev(samples) / count**0.5, rel=1e-3)


def test_one_sample_has_no_interval_and_none_is_refused():
    alone = interval([3.0])
    assert alone == (3.0, None)
    assert (alone.low, alone.high, alone.bounds) == (-math.inf, math.inf, None)
    with pytest.raises(ValueError, match="at least one sample"):
        interval([])


def test_the_interval_covers_the_truth_in_95_of_100_experiments():
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        found = interval([rng.gauss(7.0, 2.0) for _ in range(5)])
        covered += found.low <= 7.0 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.floats(-50, 50))
def test_what_both_sides_share_cancels_in_a_paired_difference(shared, gain):
    found = paired_difference([value + gain for value in shared], shared)
    assert found.mean == pytest.approx(gain, abs=1e-9)
    assert found.half == pytest.approx(0, abs=1e-9)


def test_a_pair_needs_both_sides():
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


@given(st.lists(st.floats(1, 100), min_size=2, max_size=8), st.floats(0.1, 10))
def test_a_constant_ratio_is_certain(theirs, ratio):
    found = paired_ratio([ratio * value for value in theirs], theirs)
    assert found.mean == pytest.approx(ratio)
    assert found.half == pytest.approx(0, abs=1e-6)


def test_a_ratio_is_of_means_and_survives_a_zero():
    found = paired_ratio([1.0, 1.0, 1.0], [0.0, 0.5, 1.0])
    assert found.mean == pytest.approx(2.0)
    residuals = [1.0 - 2 * value for value in (0.0, 0.5, 1.0)]
    assert found.half == pytest.approx(4.303 * statistics.stdev(residuals) / 3**0.5 / 0.5, rel=1e-3)
    assert paired_ratio([1.0, 2.0], [0.0, 0.0]) is None


def run_of(policy, rt, be):
    classes = {"rt": dict.fromkeys(METRICS["rt"], rt), "be": dict.fromkeys(METRICS["be"], be)}
    return {"policy": policy, "classes": classes}


def test_rows_keep_policies_apart_and_tell_what_has_no_sample():
    runs = [run_of("a", 0.5, 10.0), run_of("b", None, 7.0), run_of("a", 1.0, 40.0), run_of("a", 0.9, 10.0)]
    a, b = interval_rows(runs)
    assert [(row["policy"], row["seeds"]) for row in (a, b)] == [("a", 3), ("b", 1)]
    mean, half = a["be.output_throughput"]
    assert (mean, a["median"]["be.output_throughput"]) == (20.0, 10.0)
    assert a["interval95"]["be.output_throughput"] == pytest.approx([mean - half, mean + half])
    assert b["rt.slo_attainment"] is b["median"]["rt.slo_attainment"] is b["interval95"]["rt.slo_attainment"] is None
    assert (b["be.output_throughput"], b["interval95"]["be.output_throughput"]) == ([7.0, None], None)
    json.dumps([a, b], allow_nan=False)
