"""Drawing for a whole batch: greedy rows, the distribution, top-p, rows that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bros_ref.gpu.sampler import NOT_FINITE, draw_of, needs_history, sample_rows
from bros_ref.request import Request, RequestClass, SamplingParams


def draw(logits, draws):
    return sample_rows(logits, torch.tensor(draws, dtype=torch.float32).T.contiguous(), draws).tolist()


def finite_logs(chances):
    """Logits of these chances; of none where it is 0, and finite all the same."""
    return chances.log().nan_to_num(neginf=-1e4)


def test_each_token_is_drawn_as_often_as_its_chance_says():
    chances = torch.tensor([0.1, 0.0, 0.5, 0.15, 0.25])
    count = 2000
    tokens = draw(finite_logs(chances).expand(count, -1), [(1.0, 1.0, (i + 0.5) / count) for i in range(count)])
    assert (torch.bincount(torch.tensor(tokens), minlength=5) / count).tolist() == pytest.approx(chances.tolist(),
                                                                                                abs=0.001)


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([0.0, 1.0]).expand(1000, -1)
    for temperature in (0.5, 2.0):
        tokens = draw(logits, [(temperature, 1.0, (i + 0.5) / 1000) for i in range(1000)])
        assert sum(tokens) / 1000 == pytest.approx(1 / (1 + np.exp(-1 / temperature)), abs=0.002)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {2}), (0.51, {2, 4}), (0.75, {2, 4}), (0.8, {2, 3, 4}),
                                             (0.01, {2}), (1.0, {0, 2, 3, 4})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = finite_logs(torch.tensor([0.1, 0.0, 0.5, 0.15, 0.25])).expand(400, -1)
    assert set(draw(logits, [(1.0, top_p, (i + 0.5) / 400) for i in range(400)])) == kept


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24, 1.0])
def test_the_ends_of_the_interval_give_tokens_that_have_a_chance(uniform):
    chances = torch.zeros(1, 1000)
    chances[0, [3, 500]] = 0.5
    for top_p in (1.0, 0.99):
        assert draw(finite_logs(chances), [(1.0, top_p, uniform)])[0] in (3, 500)


def test_rows_do_not_know_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    draws = [(0.0, 1.0, 0.0), (1.0, 1.0, 0.3), (0.7, 0.9, 0.8), (0.0, 1.0, 0.0), (2.0, 0.5, 0.1), (1.0, 1.0, 0.99)]
    together = draw(logits, draws)
    assert together == [draw(logits[i:i + 1], draws[i:i + 1])[0] for i in range(6)]
    assert [together[0], together[3]] == logits.argmax(-1)[[0, 3]].tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_spoils_itself_only(bad):
    logits = torch.zeros(3, 9)
    logits[:, 4] = 5.0
    logits[1, 7] = bad
    for draws in ([(0.0, 1.0, 0.0)] * 3, [(1.0, 0.5, 0.5)] * 3):
        assert draw(logits, draws) == [4, NOT_FINITE, 4]


def request(seed=3, **sampling):
    made = Request("r", RequestClass.BEST_EFFORT, [1, 2, 3], SamplingParams(**sampling))
    made.seed = seed
    return made


def test_a_draw_depends_on_seed_and_position():
    one = request(temperature=0.8, top_p=0.5)
    assert draw_of(one) == draw_of(request(temperature=0.8, top_p=0.5))
    assert draw_of(one) != draw_of(request(seed=4, temperature=0.8, top_p=0.5))
    before = draw_of(one)
    one.num_tokens += 1
    assert draw_of(one) != before
    assert draw_of(request(temperature=0.0)) == draw_of(request(temperature=1e-5)) == (0.0, 1.0, 0.0)
    assert 0 <= before[2] < 1


@pytest.mark.parametrize(("sampling", "needed"), [
    ({}, False), ({"logprobs": 0}, True), ({"presence_penalty": 0.1}, True), ({"frequency_penalty": -0.1}, True),
    ({"temperature": 2.0}, False)])
def test_what_needs_more_than_logits_is_left_to_the_reference(sampling, needed):
    assert needs_history(request(**sampling)) == needed
