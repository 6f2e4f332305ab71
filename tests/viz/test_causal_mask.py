"""The causal-mask explorer: who sees which slot is what the model's attention computes; the page is one piece."""

import json
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.model.attention import AttentionMetadata
from bros_ref.viz.widgets.causal_mask import (
    EARLY,
    FOREIGN,
    LATER,
    MISSED,
    OTHER,
    SEEN,
    CausalMaskExplorer,
    MaskSetting,
    mask_note,
    mask_svg,
    slot_kinds,
)

TOKENS = [f"<{i}>" for i in range(24)]


@st.composite
def settings(draw, by_column=False):
    context = draw(st.integers(1, 24))
    return MaskSetting(draw(st.integers(1, min(8, context))), context, draw(st.sampled_from([1, 3, 4, 8, 16])),
                       draw(st.booleans()), by_column)


def model_sees(setting):
    """[query] sets of slots that `paged_attention` gathers for each row."""
    table = list(range(setting.num_slots // setting.block_size))
    meta = AttentionMetadata.build([table], [setting.reversed], [setting.query], [setting.context], setting.block_size)
    groups, prefills = meta.plan
    if groups:
        return [set(groups[0].slots[0].tolist())]
    [sequence] = prefills
    if sequence.mask is None:  # everything is new: plain causal
        return [set(sequence.slots[:row + 1].tolist()) for row in range(setting.query)]
    return [set(sequence.slots[row].tolist()) for row in sequence.mask]


@given(settings())
def test_a_row_sees_the_slots_that_the_model_gathers_for_it(setting):
    kinds = slot_kinds(setting)
    assert [{slot for slot, kind in enumerate(row) if kind == SEEN} for row in kinds] == model_sees(setting)
    assert {kind for row in kinds for kind in row} <= {SEEN, LATER, OTHER}
    assert all(row.count(OTHER) == setting.num_slots - setting.context for row in kinds)


@given(settings(by_column=True))
def test_a_mask_by_column_is_wrong_exactly_where_it_differs(setting):
    for row, (kinds, sees) in enumerate(zip(slot_kinds(setting), model_sees(setting), strict=True)):
        read = {slot for slot, kind in enumerate(kinds) if kind in (SEEN, EARLY, FOREIGN)}
        assert read == set(range(setting.context - setting.query + row + 1))
        assert {slot for slot, kind in enumerate(kinds) if kind in (SEEN, MISSED)} == sees
        if not setting.reversed:
            assert read == sees


def test_the_note_counts_what_is_wrong():
    tokens = ["a", "b", "c", "d", "e"]
    assert mask_note(MaskSetting(1, 5, 8, True), 0, tokens) == (
        "row 0 is token 4 (e): it must see tokens 0 to 4, and reads slots 3, 4, 5, 6, 7")
    assert mask_note(MaskSetting(1, 5, 8, True, True), 0, tokens).endswith(
        "reads slots 0, 1, 2, 3, 4; 6 of these slots are wrong")


@given(settings(), st.integers(0, 7))
def test_the_picture_is_xml_with_a_box_for_every_row_of_both_orders(setting, row):
    root = ElementTree.fromstring(mask_svg(setting, min(row, setting.query - 1), TOKENS))
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if "data-row" in box.attrib]
    assert len(boxes) == setting.query * (setting.context + setting.num_slots)
    assert max(float(box.get("x")) for box in boxes) + 20 <= 812 or setting.block_size == 1


def test_the_page_is_one_piece():
    explorer = CausalMaskExplorer(["</script>", "\n", *TOKENS])
    page = explorer.to_html()
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(packed)["labels"][:2] == ["&lt;/script&gt;", "\\n"]
    assert len(explorer.tokens) == 24
    assert "http" not in page.replace("http://www.w3.org", "")
    assert explorer._repr_mimebundle_()["text/plain"] == repr(explorer)


@pytest.mark.parametrize("call", [
    lambda: MaskSetting(0, 4, 8), lambda: MaskSetting(5, 4, 8), lambda: MaskSetting(1, 1, 0),
    lambda: mask_svg(MaskSetting(2, 4, 8), 2, TOKENS), lambda: mask_svg(MaskSetting(2, 4, 8), 0, TOKENS[:3]),
    lambda: CausalMaskExplorer(TOKENS[:3], MaskSetting(1, 4, 8)),
    lambda: CausalMaskExplorer(TOKENS, MaskSetting(9, 9, 8)),
])
def test_bad_settings_are_refused_with_the_numbers(call):
    with pytest.raises(ValueError, match=r"\d"):
        call()
