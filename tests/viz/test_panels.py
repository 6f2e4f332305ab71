"""The panels: what a press does to the engine or the pool, and that the picture says so."""

import asyncio
import re
from html import unescape

import pytest
from harness import checksum_engine, make_request

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.trace import BlockView
from bros_ref.viz.widgets.ask_panel import AskPanel
from bros_ref.viz.widgets.html import panel_output
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
    assert bundle["text/html"] == panel_output("", made.picture.value)["text/html"]
    assert "<button" not in bundle["text/html"]
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


def pool_panel():
    kv = KVCacheManager(KVCacheConfig(num_blocks=3, block_size=4))
    return PoolPanel(kv, lambda n: (make_request(f"r{n}", False, range(7), 5), 7))


def test_the_pool_panel_allocates_appends_and_frees():
    made = pool_panel()
    kv = made.kv
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


def ask_panel(num_blocks=12, output=20):
    engine = checksum_engine("bros", num_blocks=num_blocks)
    for i in range(2):
        engine.add_request(make_request(f"be{i}", False, range(10), output))
    return AskPanel(engine, lambda n, text: make_request(f"rt{n}", True, range(1, len(text) + 1), 3))


def rows_of(made):
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for name, row in
             re.findall(r'<tr data-request="(.*?)">(.*?)</tr>', made.picture.value, re.DOTALL)}
    return {name: [unescape(cell) for cell in row] for name, row in cells.items()}


def test_a_question_is_asked_in_the_middle_of_the_work_and_answered():
    made = ask_panel()
    assert "nothing has run yet" in made.picture.value
    made.step_button.click()
    made.step_button.click()
    made.box.value = "  why?  "
    made.ask_button.click()
    assert made.box.value == ""
    assert len(made.engine.scheduler.requests["rt0"].prompt_token_ids) == len("why?")
    assert rows_of(made)["rt0"][2:] == ["", ""]
    made.step_button.click()
    step, rows = made.trace.steps[-1], rows_of(made)
    assert list(rows) == ["be0", "be1", "rt0"]
    for name, (_, state, slack, text) in rows.items():
        assert (f"{step.scheduled[name]} token" in state) == (name in step.scheduled)
        assert slack == (f"{1e3 * step.slack_s[name]:.0f} ms" if name in step.slack_s else "")
        assert text == ""  # this engine has no tokenizer, so no streams
    assert rows["rt0"][2]
    made.ask_button.click()  # an empty box asks the example
    assert len(made.engine.scheduler.requests["rt1"].prompt_token_ids) == len(made.box.placeholder)


def test_it_plays_until_nothing_is_left_and_takes_a_question_on_the_way():
    made = ask_panel()

    async def play():
        made.play_button.click()
        assert made.play_button.description == "pause"
        while len(made.trace.steps) < 3:
            await asyncio.sleep(0)
        made.ask_button.click()
        await made.playing

    asyncio.run(play())
    assert not made.engine.has_unfinished
    assert made.play_button.description == "play"
    assert {row[1] for row in rows_of(made).values()} == {"has ended"}
    steps = len(made.trace.steps)
    made.step_button.click()
    assert len(made.trace.steps) == steps


def test_a_second_press_pauses():
    made = ask_panel(num_blocks=120, output=200)

    async def play():
        made.play_button.click()
        while len(made.trace.steps) < 2:
            await asyncio.sleep(0)
        made.play_button.click()
        steps = len(made.trace.steps)
        await asyncio.sleep(0.1)
        assert len(made.trace.steps) == steps

    asyncio.run(play())
    assert made.engine.has_unfinished
    assert made.play_button.description == "play"


def test_a_question_that_the_engine_refuses_is_explained():
    made = ask_panel()
    made.box.value = "x" * 60
    made.ask_button.click()
    assert "60 prompt + 3 new tokens exceed the KV pool" in made.picture.value
    assert made.box.value == "x" * 60
    made.box.value = "x"
    made.ask_button.click()
    assert "exceed" not in made.picture.value


def test_a_text_is_shown_as_text_and_an_ask_panel_needs_a_trace():
    made = ask_panel()
    made.engine.streams["be0"] = type("Said", (), {"text": "<b>" + "x" * 300})
    made.step_button.click()
    assert rows_of(made)["be0"][3] == "… " + "x" * 160
    made.engine.streams["be0"] = type("Said", (), {"text": "<b>bold"})
    made.step_button.click()
    assert "&lt;b&gt;bold" in made.picture.value
    bundle = made._repr_mimebundle_()
    assert bundle["text/html"] == panel_output("", made.picture.value)["text/html"]
    assert bundle["text/plain"] == repr(made) == "a panel of 2 requests: ask now, one step, play"
    made.engine.trace = None
    with pytest.raises(ValueError, match="has none"):
        AskPanel(made.engine, lambda n, text: None)


@pytest.mark.parametrize("made", [panel, pool_panel, ask_panel], ids=["inject", "pool", "ask"])
def test_every_panel_has_a_line_for_a_kernel_that_is_gone(made):
    [watch] = [child for child in made().widget.children if "asked" in child.trait_names()]
    watch.asked = 3  # a click in the browser
    assert watch.answered == 3
