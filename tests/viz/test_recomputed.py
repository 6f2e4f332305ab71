"""Recomputed or reused: the pictures and the counts are those of the passes."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.viz.widgets.recomputed import AGAIN, NEW, REUSED, ForwardPass, kinds, pairs_so_far, recomputed

TOKENS = ["<s>", "&", "\n", *(f"t{i}" for i in range(40))]


def growing(prompt, steps, cached):
    return [ForwardPass(prompt + i, prompt + i - 1 if cached and i else 0) for i in range(steps)]


@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 30))
def test_a_cache_computes_every_pair_once_and_no_cache_a_triangle(prompt, steps, layers):
    last = steps - 1
    assert pairs_so_far(growing(prompt, steps, True), last, layers) == layers * (prompt + last)
    assert pairs_so_far(growing(prompt, steps, False), last, layers) == layers * sum(range(prompt, prompt + steps))


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19)).filter(lambda p: p[1] < p[0]), min_size=1,
                max_size=6))
def test_kinds_add_up_to_what_was_computed(pairs):
    passes = [ForwardPass(*pair) for pair in pairs]
    for at, one in enumerate(passes):
        found = kinds(passes, at)
        assert len(found) == one.context
        assert found.count(NEW) + found.count(AGAIN) == one.context - one.first
        assert found == sorted(found, key=[REUSED, AGAIN, NEW].index)  # equal columns follow one another


def test_a_token_is_new_once():
    passes = growing(3, 3, False)
    assert [kinds(passes, at) for at in range(3)] == [[NEW] * 3, [AGAIN] * 3 + [NEW], [AGAIN] * 4 + [NEW]]
    assert kinds(growing(3, 3, True), 2) == [REUSED] * 4 + [NEW]


def test_a_picture_a_pass_with_its_counts():
    frames = recomputed({"no cache": growing(3, 4, False), "cache": growing(3, 4, True)}, TOKENS, 30).frames
    assert [frame.caption for frame in frames][2] == (
        "pass 3, K/V pairs: no cache 30 computed, 120 computed again; cache 30 computed, 120 reused")
    root = ElementTree.fromstring(frames[2].svg)
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "no cache: 360 K/V pairs computed so far" in texts
    assert "cache: 150 K/V pairs computed so far" in texts
    assert texts.count("\\n") == 2
    tips = [tip.text for tip in root.iter("{http://www.w3.org/2000/svg}title")]
    assert tips[5] == "token 5 (t2): not there yet"
    assert tips[6:8] == ["token 0 (<s>): reused", "token 1 (&): reused"]
    assert "id=" not in frames[2].svg  # nothing that a hidden still would have to define


@pytest.mark.parametrize("call", [
    lambda: ForwardPass(3, 3), lambda: ForwardPass(3, -1),
    lambda: recomputed({"a": growing(3, 2, True), "b": growing(3, 3, True)}, TOKENS, 2),
    lambda: recomputed({"a": growing(3, 2, True)}, TOKENS[:3], 2), lambda: recomputed({}, TOKENS, 2)])
def test_what_cannot_be_drawn_is_refused(call):
    with pytest.raises(ValueError, match=r"cannot compute|need variants"):
        call()
