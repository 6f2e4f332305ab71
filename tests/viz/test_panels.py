"""The panels: what a press does to the engine or the pool, and that the picture says so."""

import pytest
from harness import checksum_engine, make_request

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.trace import BlockView
from bros_ref.viz.widgets.panels import InjectPanel, PoolPanel, holdings


def panel(num_blocks=12):
    engine = checksum_engine("bros", num_blocks=num_blocks)
    for i in range(3):
        engine.add_request(make_request(f"be{i}", False, range(10), 20))
    return InjectPanel(engine, lambda n: [make_request(f"rt{n}-{i}", True, range(6), 3) for i in range(2)], steps=3)


def test_a_press_sends_a_burst_and_shows_it():
    made = panel()
    assert 'data-count="0"' in made.picture.value
    made.inject_button.click()
    made.inject_button.click()
    assert 'data-count="2"' in made.picture.value
    assert {"rt0-0", "rt0-1", "rt1-0", "rt1-1"} <= set(made.trace.requests)
    assert any(view.rt_owner is not None for pool in made.trace.pools() for view in pool)
    assert f"step {len(made.trace.steps)}," in made.picture.value


def test_where_no_kernel_runs_the_picture_is_shown():
    made = panel()
    bundle = made._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"] == made.picture.value
    assert bundle["text/plain"] == repr(made)


def test_it_stops_when_there_is_nothing_to_run():
    made = panel()
    for _ in range(60):
        made.run_button.click()
    assert not made.engine.has_unfinished
    steps = len(made.trace.steps)
    made.run_button.click()
    assert len(made.trace.steps) == steps


def test_an_engine_without_a_trace_is_refused():
    engine = checksum_engine("bros")
    engine.trace = None
    with pytest.raises(ValueError, match="has none"):
        InjectPanel(engine, lambda n: [])


def test_the_pool_panel_allocates_appends_and_frees():
    kv = KVCacheManager(KVCacheConfig(num_blocks=3, block_size=4))
    made = PoolPanel(kv, lambda n: (make_request(f"r{n}", False, range(7), 5), 7))
    made.buttons["new request"].click()
    assert "r0 came with 7 tokens; 2 of 3 blocks in use" in made.picture.value
    assert f"r0: 7 tokens, block table {kv.block_table('r0')}" in made.picture.value
    made.buttons["new request"].click()
    assert "no room for 7 tokens" in made.picture.value
    made.buttons["one token each"].click()
    assert len(kv.block_table("r0")) == 2
    made.buttons["one token each"].click()
    assert len(kv.block_table("r0")) == 3
    made.buttons["oldest leaves"].click()
    assert kv.num_free_blocks == 3
    assert "block table" not in made.picture.value
    made.buttons["oldest leaves"].click()
    assert "nobody" in made.picture.value
    kv.check_integrity()


def test_holdings_are_the_block_tables_in_logical_order():
    kv = KVCacheManager(KVCacheConfig(num_blocks=3, block_size=4))
    first, second = make_request("first", True, range(3), 1), make_request("second", False, range(4), 9)
    kv.allocate_slots(first, 3)
    kv.allocate_slots(second, 4)
    kv.free("first")
    kv.allocate_slots(second, 3)  # into the block that the first has left, which comes before its own
    assert holdings(kv.snapshot()) == {"second": (7, [1, 0])}
    assert kv.block_table("second") == [1, 0]
    pool = [BlockView("a", 2, "b", 4, 1, 1, 0), BlockView(), BlockView("a", 4, None, 0, 0, 0, 0)]
    assert holdings(pool) == {"a": (6, [2, 0]), "b": (3, [0])}
