"""The latency model: it finds the truth, follows it when it drifts, and its inverse is exact."""

import math
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bros_ref.scheduler import latency_model
from bros_ref.scheduler.latency_model import (
    FIRST_FIT_STEPS,
    FORGETTING,
    MAX_SAFETY,
    REFIT_EVERY_STEPS,
    UNLIMITED_TOKENS,
    StepFeatures,
    StepLatencyModel,
)

TRUTH = (5e-3, 2e-5, 3e-9, 1e-7)  # of the order of a 13B model on one accelerator

coefficients = st.sampled_from([0.0, 1e-30, 1e-9, 1e-5, 1e-2]) | st.floats(0, 1)
models = st.builds(lambda *c: StepLatencyModel(c), *[coefficients] * 4)


def features(*sequences):
    """Features of a batch of (new tokens, context)."""
    result = StepFeatures()
    for new, context in sequences:
        result.add(new, context)
    return result


def random_batch(rng):
    prefills = [(rng.randint(2, 512), rng.choice([0, rng.randint(1, 1024)])) for _ in range(rng.randint(0, 2))]
    return features(*prefills, *[(1, rng.randint(1, 2048)) for _ in range(rng.randint(not prefills, 64))])


def measured(rng, truth, count, noise=0.0):
    model = StepLatencyModel(truth)
    return [(batch, model.predict(batch) * rng.lognormvariate(0, noise)) for batch in
            (random_batch(rng) for _ in range(count))]


# -- fit ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_fit_recovers_the_coefficients_that_made_the_samples(seed):
    rng = random.Random(seed)
    truth = [value * rng.uniform(0.2, 5) for value in TRUTH]
    fitted = StepLatencyModel.fit(measured(rng, truth, 200))
    assert fitted.coefficients == pytest.approx(truth, rel=1e-4)
    assert fitted.safety == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.floats(0.01, 0.2))
def test_fit_under_noise_predicts_well_and_its_safety_factor_covers_95_percent(seed, noise):
    samples = measured(random.Random(seed), TRUTH, 400, noise)
    fitted = StepLatencyModel.fit(samples)
    assert min(fitted.coefficients) >= 0
    ratios = [seconds / fitted.predict(batch) for batch, seconds in samples[-256:]]
    assert np.mean([ratio <= fitted.safety for ratio in ratios]) >= 0.94
    assert np.median(ratios) == pytest.approx(1, abs=0.05 + noise)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 512), st.floats(1e-6, 10)), min_size=4, max_size=12))
def test_no_fit_is_ever_negative_or_not_finite(samples):
    fitted = StepLatencyModel.fit([(features((new, context)), seconds) for new, context, seconds in samples])
    assert all(math.isfinite(value) and value >= 0 for value in fitted.coefficients)
    assert 1 <= fitted.safety <= MAX_SAFETY


@pytest.mark.parametrize("samples", [  # (new tokens, products, contexts), seconds: of a machine that others use too
    [((17, 128.0, 20), 7e-4), ((106, 5006.5, 1), 1e-5), ((1, 0.0, 0), 6e-2), ((2, 2.0, 0), 6e-2)],
    [((4, 4.5, 1), 3e-5), ((3, 4.5, 0), 0.6), ((6, 4.0, 2), 7e-2), ((1, 0.0, 2), 8e-4)],
])
def test_samples_that_contradict_each_other_are_fitted_too(samples):
    """The best fit may say that some of them take no time at all."""
    samples = [(StepFeatures(*features), seconds) for features, seconds in samples]
    model = StepLatencyModel.fit(samples)
    assert min(model.predict(features) for features, _ in samples) == 0  # else this case tests nothing
    assert 1 <= model.safety <= MAX_SAFETY


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_fit_refuses_durations_that_no_clock_gives(seconds):
    samples = [(features((8, 0)), 0.1)] * 5 + [(features((8, 0)), seconds)]
    with pytest.raises(ValueError, match="finite positive durations"):
        StepLatencyModel.fit(samples)


def test_fit_refuses_too_few_samples():
    with pytest.raises(ValueError, match=r"at least 4 samples.*got 3"):
        StepLatencyModel.fit([(features((8, 0)), 0.1)] * 3)


@pytest.mark.parametrize("bad", [(1.0, 1.0, 1.0), (1.0, -1.0, 0.0, 0.0), (math.nan, 0.0, 0.0, 0.0),
                                 (math.inf, 0.0, 0.0, 0.0)])
def test_impossible_coefficients_are_refused(bad):
    with pytest.raises(ValueError, match="four finite coefficients"):
        StepLatencyModel(bad)


def test_an_impossible_restore_time_is_refused():
    with pytest.raises(ValueError, match="restore_s_per_token nan"):
        StepLatencyModel(TRUTH, math.nan)


# -- prediction -----------------------------------------------------------------------------------------------------


@given(models, st.lists(st.tuples(st.integers(1, 64), st.integers(0, 512)), min_size=1, max_size=8))
def test_the_cost_of_one_more_request_is_what_it_adds_to_the_prediction(model, batch):
    alone = sum(model.cost_s(new, context) for new, context in batch)
    assert model.predict(features(*batch)) == pytest.approx(model.c0 + alone)


@given(models, st.floats(0, 100), st.integers(0, 4096))
@example(StepLatencyModel((0, 1e-3, 2e-20, 0)), 1.00000000000001, 0)  # a closed formula loses its digits here
@example(StepLatencyModel((0, 5e-324, 0.0, 0)), 1.0, 0)
@example(StepLatencyModel((0, 0, 6.559422158905107e-260, 1e-30)), 6.559422158905107e-260, 1)  # the same, rounded
@example(StepLatencyModel((0, 1e-5, 0.0, 1.0)), 0.5, 4096)  # one token costs what a decode costs, here more than two
@example(StepLatencyModel((0.01, 0.001, 0.01, 0)), 0.05, 10)  # and here less: one fits, though two cost 0.22 s
def test_the_longest_chunk_is_the_exact_inverse_of_the_cost(model, spare_s, context):
    """The largest count whose cost fits: it fits, and one more does not."""
    longest = model.max_new_tokens(spare_s, context)
    assert 0 <= longest <= UNLIMITED_TOKENS
    if longest:
        assert model.cost_s(longest, context) <= spare_s
    if longest < UNLIMITED_TOKENS:
        assert model.cost_s(longest + 1, context) > spare_s
        assert model.cost_s(max(2, longest + 1), context) > spare_s


@given(st.floats(1e-9, 1e-2), st.floats(0, 1e-6), st.integers(2, 4096), st.integers(0, 4096))
@example(1e-3, 2e-20, 1000, 0)
def test_a_chunk_fits_into_exactly_its_own_cost(c1, c2, count, context):
    model = StepLatencyModel((0.0, c1, c2, 0.0))
    assert model.max_new_tokens(model.cost_s(count, context) * (1 + 1e-9), context) == count


def test_no_time_buys_no_token_and_endless_time_any_number():
    model = StepLatencyModel(TRUTH)
    assert model.max_new_tokens(0.0, 10) == model.max_new_tokens(-1.0, 10) == 0
    assert model.max_new_tokens(math.inf, 10) == UNLIMITED_TOKENS
    assert StepLatencyModel((0.1, 0, 0, 0)).max_new_tokens(1e-9, 10) == UNLIMITED_TOKENS


def test_copies_overlap_the_computation():
    model = StepLatencyModel((0.1, 0, 0, 0), restore_s_per_token=0.01)
    batch = features((1, 5))
    for restored, seconds in ((0, 0.1), (10, 0.1), (11, 0.11)):
        batch.restored_tokens = restored
        assert model.predict(batch) == pytest.approx(seconds)
    assert StepLatencyModel((0.1, 0, 0, 0)).predict(batch) == 0.1, "unless told otherwise they take no time"


# -- refitting online -----------------------------------------------------------------------------------------------


def follow(model, rng, truth, steps, batches=random_batch, noise=0.0):
    real = StepLatencyModel(truth)
    for _ in range(steps):
        batch = batches(rng)
        model.observe(batch, real.predict(batch) * rng.lognormvariate(0, noise))


def error(model, truth, rng, batches=random_batch):
    real = StepLatencyModel(truth)
    tried = [batches(rng) for _ in range(100)]
    return np.mean([abs(model.predict(batch) / real.predict(batch) - 1) for batch in tried])


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.floats(0.4, 2.5))
def test_it_follows_a_machine_that_became_faster_or_slower(seed, factor):
    rng, model = random.Random(seed), StepLatencyModel(TRUTH)
    drifted = [value * factor for value in TRUTH]
    before = error(model, drifted, rng)
    follow(model, rng, drifted, 400)
    assert error(model, drifted, rng) <= max(0.3 * before, 0.01)
    assert min(model.coefficients) >= 0


@settings(max_examples=5)
@given(st.integers(0, 2**32))
def test_what_recent_steps_say_nothing_about_is_not_forgotten(seed):
    """Hours of decodes must not erase what a prefill costs."""
    rng, model = random.Random(seed), StepLatencyModel(TRUTH)
    follow(model, rng, TRUTH, 200, noise=0.02)

    def decodes(rng):
        return features(*[(1, rng.randint(1, 2048)) for _ in range(rng.randint(1, 64))])

    follow(model, rng, TRUTH, 3000, decodes, noise=0.02)
    prefill = features((512, 0))
    assert model.predict(prefill) == pytest.approx(StepLatencyModel(TRUTH).predict(prefill), rel=0.35)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_steps_that_waited_for_copies_do_not_teach_what_computing_costs(seed):
    rng, model = random.Random(seed), StepLatencyModel(TRUTH, restore_s_per_token=1e-3)
    for _ in range(200):
        batch = random_batch(rng)
        batch.restored_tokens = 500
        model.observe(batch, StepLatencyModel(TRUTH, 1e-3).predict(batch))
    assert error(model, TRUTH, rng) < 1e-9


def test_the_safety_factor_is_the_95th_percentile_of_surprise():
    rng, model = random.Random(5), StepLatencyModel(TRUTH)
    follow(model, rng, TRUTH, 640, noise=0.1)
    assert model.safety == pytest.approx(math.exp(1.645 * 0.1), rel=0.06)
    follow(model, rng, TRUTH, 640)
    assert model.safety == pytest.approx(1.0, abs=0.02)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_no_observation_makes_it_negative_or_breaks_it(seed):
    rng, model = random.Random(seed), StepLatencyModel(TRUTH)
    for _ in range(64):
        model.observe(random_batch(rng), rng.choice([0.0, -1.0, 1e-9, 1e3, math.nan, math.inf, rng.uniform(0.001, 1)]))
    assert all(math.isfinite(value) and value >= 0 for value in model.coefficients)
    assert 1 <= model.safety <= MAX_SAFETY


def test_a_model_that_was_never_fitted_predicts_nothing_and_says_so():
    model = StepLatencyModel()
    assert not model.is_fitted
    assert model.predict(features((512, 0))) == 0
    assert StepLatencyModel(TRUTH).is_fitted


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.floats(0, 0.1))
def test_a_model_that_was_never_fitted_learns_from_its_first_steps_and_then_as_any_other(seed, noise):
    rng, model = random.Random(seed), StepLatencyModel()
    samples = measured(rng, TRUTH, 200, noise)
    model.observe(features((64, 0)), math.nan)
    for count, (batch, seconds) in enumerate(samples, start=1):
        model.observe(batch, seconds)
        assert model.is_fitted == (count >= 4)
    errors = [abs(model.predict(batch) / StepLatencyModel(TRUTH).predict(batch) - 1) for batch, _ in samples[-50:]]
    assert np.median(errors) < 0.03 + noise


def test_a_step_that_waited_for_copies_teaches_an_unfitted_model_nothing():
    model, restoring = StepLatencyModel(), features((64, 0))
    restoring.restored_tokens = 1
    for _ in range(8):
        model.observe(restoring, 5.0)
    assert not model.is_fitted


def test_the_safety_factor_is_never_below_one():
    """Steps that take half the predicted time are no reason to promise less than the prediction."""
    model, batch = StepLatencyModel(TRUTH), features((64, 0))
    for _ in range(16):
        model.observe(batch, model.predict(batch) / 2)
    assert model.safety == 1.0


@pytest.mark.parametrize("count", FIRST_FIT_STEPS)
def test_the_first_fit_stands_in_for_an_offline_one_in_everything(count):
    samples = measured(random.Random(3), TRUTH, count, noise=0.1)
    fitted, model = StepLatencyModel.fit(samples), StepLatencyModel()
    for batch, seconds in samples:
        model.observe(batch, seconds)
    assert tuple(model._offline) == fitted.coefficients
    if count < REFIT_EVERY_STEPS:
        assert model.coefficients == fitted.coefficients
        assert model.safety == fitted.safety > 1.0


def test_what_the_first_steps_taught_an_unfitted_model_is_not_forgotten():
    """Hours of decodes, as for a model that was fitted offline; and its first steps are not kept for ever."""
    rng, model = random.Random(4), StepLatencyModel()
    follow(model, rng, TRUTH, 64)
    follow(model, rng, TRUTH, 6000, lambda rng: features(*[(1, rng.randint(1, 2048))] * rng.randint(1, 64)))
    assert model.predict(features((512, 0))) == pytest.approx(StepLatencyModel(TRUTH).predict(features((512, 0))), 0.1)
    assert model._first_samples is None


def test_a_step_weighs_a_little_less_than_the_one_after_it():
    model, real, rng = StepLatencyModel(TRUTH), StepLatencyModel(TRUTH), random.Random(6)
    rows = []
    for _ in range(48):
        batch = random_batch(rng)
        seconds = real.predict(batch)
        model.observe(batch, seconds)
        rows.append(np.array([1, batch.new_tokens, batch.prefill_products, batch.decode_contexts]) / seconds)
    weights = [FORGETTING ** age for age in reversed(range(48))]
    assert model._gram == pytest.approx(sum(w * np.outer(row, row) for w, row in zip(weights, rows, strict=True)))
    assert model._target == pytest.approx(sum(w * row for w, row in zip(weights, rows, strict=True)))


def test_what_is_forgotten_down_to_rounding_errors_goes_back_to_the_offline_fit(monkeypatch):
    """With a memory of one step instead of 200, so that it takes 1,200 steps instead of 150,000."""
    monkeypatch.setattr(latency_model, "FORGETTING", 0.5)
    rng, model = random.Random(7), StepLatencyModel(TRUTH)
    follow(model, rng, [2 * value for value in TRUTH], 64)
    assert model.c2 > 1.5 * TRUTH[2]
    for steps in range(0, 1200, 16):
        follow(model, rng, TRUTH, 16, lambda rng: features(*[(1, rng.randint(1, 2048))] * rng.randint(1, 64)))
        assert steps < 64 or model.c2 == pytest.approx(TRUTH[2], rel=0.01)
