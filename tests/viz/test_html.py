"""What a notebook saves of a drawing, a player and a panel: a picture with or without scripts."""

from __future__ import annotations

import pytest
from untrusted import drawn, seen_untrusted

from bros_ref.viz.figures.kv_blocks import block_map
from bros_ref.viz.widgets.causal_mask import CausalMaskExplorer
from bros_ref.viz.widgets.dashboard import Dashboard
from bros_ref.viz.widgets.frames import Frame, Frames
from bros_ref.viz.widgets.html import RUN_IT, Picture, panel_output
from bros_ref.viz.widgets.player import BlockMapPlayer
from bros_ref.viz.widgets.schedule_player import SchedulePlayer
from tests.viz.factory import make_trace

SVG = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20" aria-label="two &quot;words&quot;"><text>k</text>'
       "</svg>")


def test_a_picture_shows_without_scripts():
    picture = Picture(SVG)
    bundle = picture._repr_mimebundle_()
    seen = seen_untrusted(bundle["text/html"])
    assert [drawn(image) for image in seen.images] == [SVG]
    assert seen.text.strip() == ""
    assert bundle["text/plain"] == repr(picture) == 'two "words"'
    assert 'alt="two &quot;words&quot;" width="40"' in bundle["text/html"]


@pytest.mark.parametrize("svg", ['<svg viewBox="0 0 1 1"></svg>', "<svg></svg>",
                                 '<svg><title>a "quoted" half \ud83d</title></svg>'])
def test_a_picture_may_lack_a_name_and_a_size(svg):
    [image] = seen_untrusted(Picture(svg)._repr_mimebundle_()["text/html"]).images
    assert drawn(image).startswith("<svg")


@pytest.mark.parametrize("text", ["", "a path.svg", "<div><svg></svg></div>"])
def test_what_is_no_drawing_is_refused(text):
    with pytest.raises(ValueError, match="an <svg> element"):
        Picture(text)


def test_a_player_is_its_still_until_a_script_runs():
    trace = make_trace()
    for widget in (SchedulePlayer(trace), BlockMapPlayer(trace), Dashboard(trace, trace), CausalMaskExplorer(["a"] * 9),
                   Frames([Frame(SVG, "one"), Frame(SVG, "two")], "frames")):
        bundle = widget._repr_mimebundle_()
        seen = seen_untrusted(bundle["text/html"])
        [still] = map(drawn, seen.images)
        assert still.startswith("<svg")
        assert seen.text.strip() == f"{RUN_IT}."
        assert seen.controls == []
        assert "button" in bundle["text/html"] or "input" in bundle["text/html"], "they are there, and hidden"


def test_a_panel_without_its_kernel_is_its_state():
    pool = block_map(make_trace(), 3)
    seen = seen_untrusted(panel_output("a panel", f"<div>step 3{pool}</div>")["text/html"])
    assert [drawn(image) for image in seen.images] == [pool]
    assert seen.text.strip() == f"step 3{RUN_IT}: its buttons need a running kernel."


def test_what_is_not_hidden_is_seen():
    """The reading is awake: scripts apart, everything else of a page is seen."""
    seen = seen_untrusted('<div hidden><button>go</button></div><svg><text>in</text><title>tip</title></svg>after'
                          '<p style="color:red;display:none">no<img src="x"></p><script>no</script>')
    assert (seen.text, seen.images, seen.controls) == ("gointipafter", [], ["button"])
