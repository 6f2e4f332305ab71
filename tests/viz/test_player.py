"""What the KV player's page carries replays to the pool, and the page is one self-contained piece."""

import json
import re

import pytest
from untrusted import saved_still

from bros_ref.trace import BlockView, Trace
from bros_ref.viz.widgets.player import BlockMapPlayer, pool_changes, pool_data
from tests.viz.factory import make_trace


def pool_after(trace, steps):
    """The pools that a page's changes add up to, as pool.js adds them."""
    names, pool = [*trace.requests, None], [BlockView() for _ in range(trace.num_blocks)]
    for changes in steps:
        for at in range(0, len(changes), 8):
            block, rt, rt_index, rt_fill, be, be_index, be_fill, lost = changes[at:at + 8]
            pool[block] = BlockView(names[rt], rt_fill, names[be], be_fill, lost, rt_index, be_index)
        yield list(pool)


@pytest.mark.parametrize("seed", range(4))
def test_the_changes_add_up_to_the_pool_of_every_step(seed):
    trace = make_trace(seed=seed)
    assert list(pool_after(trace, pool_changes(trace))) == list(trace.pools())


def test_the_changes_between_moments_add_up_to_their_pools():
    trace = make_trace()
    moments = [-1, -1, 0, 7, 7, 20, len(trace.steps) - 1]
    pools = list(pool_after(trace, pool_changes(trace, moments)))
    assert pools[:2] == [[BlockView()] * trace.num_blocks] * 2
    assert pools[2:] == [trace.pool_at(step) for step in moments[2:]]
    every = pool_data(trace)["copies"]
    assert any(every)
    assert pool_data(trace, moments)["copies"] == [[], [], *(every[step] for step in moments[2:])]


def test_the_page_is_one_piece():
    player = BlockMapPlayer(make_trace())
    page = player.to_html()
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(packed)["num_blocks"] == player.trace.num_blocks
    assert "http" not in page.replace("http://www.w3.org", "")
    bundle = player._repr_mimebundle_()
    assert saved_still(bundle).startswith("<svg")
    assert bundle["text/plain"] == repr(player)


def test_a_trace_without_steps_is_refused():
    empty = Trace("bros", "toy", "cpu", 8, 16, 64, 0)
    with pytest.raises(ValueError, match="no steps"):
        BlockMapPlayer(empty)
