"""Text from outside that looks like markup breaks no page: read by a parser that follows the HTML standard, what comes
after a widget is still there, and the scripts get the data that was meant."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.trace import Trace
from bros_ref.trace.metrics import summarise
from bros_ref.viz.figures import report
from bros_ref.viz.widgets.causal_mask import CausalMaskExplorer
from bros_ref.viz.widgets.dashboard import Dashboard
from bros_ref.viz.widgets.frames import Frame, Frames
from bros_ref.viz.widgets.html import script_json
from bros_ref.viz.widgets.player import BlockMapPlayer
from bros_ref.viz.widgets.priority_race import PriorityRace
from bros_ref.viz.widgets.schedule_player import SchedulePlayer
from bros_ref.viz.widgets.what_if import Choice, WhatIf
from tests.viz.factory import make_trace

HOSTILE = ("<!--<script>", "</script><p id=injected>", "<!--", "]]></title></svg>", "\" onload='x' &amp;<b>",
           "\u2028\u2029", "half \ud83d", "<![CDATA[")


def hostile_trace(text: str, tmp_path: Path, policy: str = "bros") -> Trace:
    """The toy's run in which the first requests of both classes, and the model, are called by this text."""
    path = tmp_path / "trace.json"
    trace = make_trace(policy)
    trace.model = text
    trace.save(path)
    content = path.read_text()
    for name in ("rt-0", "be-0", "rt-refused"):
        content = content.replace(json.dumps(name), json.dumps(f"{name} {text}"))
    path.write_text(content)
    trace = Trace.load(path)
    for step in trace.steps:
        step.slack_s = {name: 0.1 for name in step.scheduled if trace.requests[name].request_class == "rt"}
    return trace


def after(html: str) -> ElementTree.Element:
    """The document in which a paragraph follows; it is still there, and nothing was let in."""
    tree = html5lib.parse(f"<!doctype html><title>t</title><body>{html}<p id=after>intact</p>",
                          namespaceHTMLElements=False)
    found = {element.get("id"): element for element in tree.iter() if element.get("id")}
    assert "injected" not in found
    assert found["after"].text == "intact"
    assert not [element for element in tree.iter() if element.get("onload")]
    return tree


def carried(tree: ElementTree.Element) -> list[object]:
    """What the scripts of a page are given."""
    return [json.loads(element.text) for element in tree.iter("script") if element.get("type") == "application/json"]


PLAYERS = {"blocks": BlockMapPlayer, "schedule": SchedulePlayer, "race": PriorityRace,
           "dashboard": lambda trace: Dashboard(trace, trace)}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", PLAYERS)
def test_a_request_id_breaks_no_player(tmp_path: Path, name: str, text: str) -> None:
    player = PLAYERS[name](hostile_trace(text, tmp_path))
    [data] = carried(after(player.to_html()))
    assert data == json.loads(json.dumps(player.data()))
    after(player.still().encode("utf-8", "replace").decode())


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_breaks_a_teaching_widget(text: str) -> None:
    tokens = [text] * 24
    [data] = carried(after(CausalMaskExplorer(tokens).to_html()))
    assert len(data["labels"]) == len(tokens)
    [data] = carried(after(Frames([Frame("<svg></svg>", text)], text).to_html()))
    assert data == {"captions": [text]}
    rt = {"slo_attainment": 0.5, "median_ttft_ms": 1.0, "p99_ttft_ms": 1.0, "median_tpot_ms": 1.0, "p99_tpot_ms": 1.0}
    answer = {"policy": text, "classes": {"rt": rt, "be": {"output_throughput": 1.0, "max_wait_s": 1.0}},
              "kv": {"num_blocks": 1, "peak_usage": 0.5, "recomputed_tokens": 1}}
    [data] = carried(after(WhatIf([Choice("policy", text, (text,))], lambda _: answer, [{"policy": text}]).to_html()))
    assert list(data) == ["known"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_breaks_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(report, "get_plotlyjs", lambda: "")  # it is not ours, and 4 MB
    traces = [hostile_trace(text, tmp_path), hostile_trace(text, tmp_path, "vllm-fcfs")]
    path = tmp_path / "report.html"
    report.write_report(path, traces, [summarise(trace) for trace in traces], text, {text: text})
    tree = after(path.read_text(encoding="utf-8").removesuffix("</body>\n</html>\n"))
    [footer] = tree.iter("footer")
    assert "Made by bros_ref" in footer.text
    charts = [element.text for element in tree.iter("script") if "Plotly.newPlot" in (element.text or "")]
    assert len(charts) >= 6, "every chart kept its script"
    for chart in charts:
        assert chart.rstrip().endswith("};"), "to its end"


@pytest.mark.parametrize("text", [*HOSTILE, "/*SCRIPT*/"])
def test_a_model_s_name_breaks_no_dashboard_of_the_server(text: str) -> None:
    pytest.importorskip("fastapi")
    from bros_ref.server.live import dashboard_page

    page = dashboard_page(make_trace(), text)
    [data] = carried(after(page.split("<body>", 1)[1].removesuffix("</body>\n</html>\n")))
    assert data["model"] == text


json_data = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)), max_leaves=8)


@settings(max_examples=60)
@given(json_data, st.sampled_from(HOSTILE))
def test_any_data_arrives_as_it_is(data: object, text: str) -> None:
    [arrived] = carried(after(f'<script type="application/json">{script_json([data, text])}</script>'))
    assert arrived == [data, text]
