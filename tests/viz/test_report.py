"""The report is one page: everything in it, nothing fetched, every string escaped, in order for a screen reader."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from bros_ref.trace import RequestRecord, Trace
from bros_ref.trace.metrics import summarise
from bros_ref.viz.figures.report import TERMS, featured_trace, verdict, write_report
from bros_ref.viz.widgets.schedule_player import SchedulePlayer
from tests.viz.factory import make_trace

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SAMPLES = {"What is <2 + 2>?": "It is 4 & no more.</main>"}
SECTIONS = ["reading", "player", "results", "trade-off", "schedule", "memory", "reasons", "prediction", "answers"]
FETCHING = {"src", "srcset", "href", "data", "poster", "action", "xlink:href", "background"}


class Page(HTMLParser):
    """What a reader's program sees: elements with their attributes, and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    traces = [make_trace(policy, seed=2, num_rt=10, num_be=12, num_blocks=30) for policy in ("vllm", "bros")]
    write_report(path, traces, [summarise(trace) for trace in traces], "A <title> & more", SAMPLES,
                 SchedulePlayer(featured_trace(traces)).to_html())
    return path


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_fetched(path: Path, page: Page) -> None:
    for tag, attributes in page.elements:
        for name in FETCHING & attributes.keys():
            assert re.match(r"#|data:", attributes[name] or "#"), f"<{tag} {name}={attributes[name]}>"
    styles = " ".join(page.text["style"])
    assert "@import" not in styles
    assert "url(" not in styles.replace("url(#", "")
    own = path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    addresses = set(re.findall(r"https?:[^\"'\s<>)]+", own.replace("\\u002f", "/")))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_plotly_is_there_once(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count(get_plotlyjs()) == 1


def test_every_section_is_there_and_linked(page: Page) -> None:
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in SECTIONS]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {section["aria-labelledby"] for section in page.all("section")} <= set(ids)


def test_the_page_is_accessible(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert page.text["title"][0] == "A <title> & more"  # the others are tooltips of the drawing
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    headings = [tag for tag, _ in page.elements if re.fullmatch(r"h[1-6]|main|header", tag)]
    assert headings[:3] == ["header", "h1", "main"]
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) == 3
    assert len(page.all("figure")) == len(page.all("figcaption")) == 2 + 2 + 3 + 2
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(svg.get("aria-label") for svg in page.all("svg"))


def test_the_numbers_are_the_summaries(page: Page) -> None:
    trace = make_trace("bros", seed=2, num_rt=10, num_be=12, num_blocks=30)
    run = summarise(trace)
    cells = page.text["td"]
    assert f"{run['classes']['rt']['slo_attainment']:.1%}" in cells
    assert f"{run['classes']['be']['output_throughput']:,.1f}" in cells
    assert f"{run['kv']['overwritten_slots']:,}" in cells
    base = summarise(make_trace("vllm", seed=2, num_rt=10, num_be=12, num_blocks=30))
    ratio = run["classes"]["rt"]["slo_attainment"] / base["classes"]["rt"]["slo_attainment"]
    assert f"× {ratio:.2f}" in page.text["small"]


def test_it_opens_with_a_verdict_of_two_sentences(page: Page) -> None:
    traces = [make_trace(policy, seed=2, num_rt=10, num_be=12, num_blocks=30) for policy in ("vllm", "bros")]
    base, run = (summarise(trace) for trace in traces)
    said = verdict(run, base)
    assert page.text["p"][0] == said
    on_time, work = ([one["classes"][kind][key] for one in (run, base)] for kind, key in (
        ("rt", "slo_attainment"), ("be", "output_throughput")))
    assert said == (f"Under bros, {on_time[0]:.1%} of the real-time requests had all their tokens in time, against "
                    f"{on_time[1]:.1%} under vllm. Best-effort work got {work[0]:,.1f} tokens per second, against "
                    f"{work[1]:,.1f} under vllm.")
    alone = verdict(base, base)
    assert "against" not in alone
    assert alone.count(". ") == 1
    for classes in ((0, 3), (3, 0)):
        trace = make_trace("bros", num_rt=classes[0], num_be=classes[1])
        del trace.requests["rt-refused"], trace.rejected["rt-refused"]
        run = summarise(trace)
        words = verdict(run, run)
        assert ("no real-time request arrived" in words) == (classes[0] == 0)
        assert ("no best-effort work" in words) == (classes[1] == 0)
        assert "none" not in words


def test_text_from_outside_is_shown_as_text(page: Page) -> None:
    assert "".join(page.text["blockquote"]) == "It is 4 & no more.</main>"
    assert "What is <2 + 2>?" in page.text["h3"]
    assert page.text["h1"] == ["A <title> & more"]
    assert [term for term in page.text["dt"] if term in TERMS] == list(TERMS)


def test_a_request_id_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    trace = make_trace("bros", num_rt=3, num_be=2)
    evil = "</script><script src=//x>"
    trace.requests[evil] = RequestRecord(evil, "be", 0.0, 4, 4)
    trace.policy = evil
    write_report(tmp_path / "r.html", [trace], [summarise(trace)], "t")
    assert not any("src" in script for script in Page((tmp_path / "r.html").read_text()).all("script"))


def test_no_samples_no_section_and_no_best_of_one(tmp_path: Path) -> None:
    trace = make_trace("bros", num_rt=3, num_be=2)
    write_report(tmp_path / "r.html", [trace], [summarise(trace)], "t")
    page = Page((tmp_path / "r.html").read_text())
    assert [section["id"] for section in page.all("section")] == [
        name for name in SECTIONS if name not in ("answers", "player")]
    assert not any(cell.get("class") for cell in page.all("td"))


@pytest.mark.parametrize("classes", [("rt",), ("be",), ()])
def test_a_run_without_one_of_the_classes_is_still_a_report(tmp_path: Path, classes: tuple[str, ...]) -> None:
    trace = make_trace("rt-only", num_rt=4 * ("rt" in classes), num_be=3 * ("be" in classes))
    if not classes:
        trace = Trace("nothing", "none", "cpu", 4, 4, 1, 0)
    write_report(tmp_path / "r.html", [trace], [summarise(trace)], "t")
    text = (tmp_path / "r.html").read_text().replace(get_plotlyjs(), "")
    assert not re.search(r">nan|>inf|>None<", text)


def test_many_policies_detail_only_the_first_and_the_featured(tmp_path: Path) -> None:
    traces = [make_trace("bros" if name == "bros" else "vllm", num_rt=3, num_be=2) for name in "abc"] + [
        make_trace("bros", num_rt=3, num_be=2)]
    for name, trace in zip(("a", "b", "bros", "c"), traces, strict=True):
        trace.policy = name
    write_report(tmp_path / "r.html", traces, [summarise(trace) for trace in traces], "t")
    labels = [figure.get("aria-label") or "" for figure in Page((tmp_path / "r.html").read_text()).all("figure")]
    assert [label for label in labels if label.startswith("Schedule")] == ["Schedule under a", "Schedule under bros"]


def test_traces_and_summaries_must_belong_together(tmp_path: Path) -> None:
    trace = make_trace("bros", num_rt=2, num_be=1)
    for traces, summaries in (([], []), ([trace], []), ([trace], [summarise(trace) | {"policy": "other"}])):
        with pytest.raises(ValueError, match="one summary for each"):
            write_report(tmp_path / "r.html", traces, summaries, "t")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 800])
def test_a_browser_without_network_draws_every_figure(path: Path, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900",
         "--virtual-time-budget=8000", "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    drawn = re.findall(r'<div id="(chart-[a-z0-9-]+)" class="plotly-graph-div js-plotly-plot"[^>]*>.*?<svg',
                       done.stdout)
    expected = re.findall(r'<div id="(chart-[a-z0-9-]+)"', path.read_text(encoding="utf-8"))
    assert drawn == expected
    assert len(drawn) == 8
