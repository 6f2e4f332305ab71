"""The published figures are those of docs/results.json, and the code still gives them.

`tools/results.py` measures and writes them. A rule that decides differently changes a digest, which costs seconds to
check; a cost model, a workload or a metric that changes is seen by repeating a cheap run of each section.
"""

import importlib
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bros_ref.cli.live import main
from bros_ref.evaluation.dominance import mean
from bros_ref.evaluation.statistics import Interval
from bros_ref.scheduler import base
from bros_ref.scheduler.bros import BROSScheduler
from bros_ref.simulator.simulate import run

ROOT = Path(__file__).resolve().parents[2]
MEASURE = "python tools/results.py --traces FOLDER"


@pytest.fixture(scope="module")
def runs():
    """tools/results_runs.py as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("results_runs")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def results(runs):
    """tools/results.py as a module."""
    return importlib.import_module("results")


@pytest.fixture(scope="module")
def kept(runs):
    return runs.read_kept()[1]


# -- the pages say what was measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["readme", "results"])
def test_a_page_has_the_figures_that_were_measured(results, kept, page):
    text = results.PAGES[page].read_text()
    assert results.with_figures(page, text, kept) == text, "python tools/results.py --pages"


@pytest.mark.parametrize("page", ["readme", "results"])
def test_a_wrong_figure_is_set_right_wherever_it_stands(results, kept, page):
    """Every digit of a table's row and of a sentence is written by the tool."""
    text = results.PAGES[page].read_text()
    for where, _, rows in results.TABLES:
        if where == page:
            [row, *_] = rows(kept)
            wrong = text.replace(row, row[:-4] + ("8" if row[-4] == "7" else "7") + row[-3:])
            assert wrong != text
            assert results.with_figures(page, wrong, kept) == text
    named = results.figures(kept)
    for sentence in results.SENTENCES.get(page, ()):
        wrong = results.with_sentence(page, text, sentence, dict.fromkeys(named, results.Shown(Interval(123, 4))))
        assert wrong != text
        assert results.with_sentence(page, wrong, sentence, named).split() == text.split(), "but for line breaks"


def test_a_sentence_or_table_that_is_gone_is_named(results, kept):
    text = results.PAGES["results"].read_text()
    with pytest.raises(ValueError, match="expected one table that begins"):
        results.with_figures("results", text.replace("| x | OPT-13B", "| y | OPT-13B"), kept)
    with pytest.raises(ValueError, match="found 0 times: `xllm` serves"):
        results.with_figures("results", text.replace("`xllm` serves", "`xllm` has"), kept)


@pytest.mark.parametrize(("figure", "spec", "text"), [
    (Interval(96.64, 6.26), "±1", "96.6 ± 6.3"), (Interval(-0.04, 0.1), "+±1", "0.0 ± 0.1"),
    (Interval(3, 1), "+±0", "+3 ± 1"), (1091.4, "0", "1,091"), (231_400, "~2", "230,000"), (296.2, "~1", "300"),
    (0.31, "~1", "0")])
def test_figures_are_shown_as_people_write_them(results, figure, spec, text):
    assert format(results.Shown(figure), spec) == text


def test_what_is_kept_is_read_as_it_was_written(runs, tmp_path):
    digests, kept = runs.read_kept()
    runs.write_kept(digests, kept, tmp_path / "results.json")
    assert runs.read_kept(tmp_path / "results.json") == (digests, kept)
    assert (tmp_path / "results.json").read_text() == (ROOT / "docs" / "results.json").read_text()


def test_no_policy_has_more_real_time_on_time_and_more_best_effort_than_bros_plus(results, kept):
    """The claim of the page, by the means over the windows."""
    means = {cell: {policy: tuple(mean(own, metric) for metric in ("rt.slo_attainment", "be.output_throughput"))
                    for policy, own in policies.items()} for cell, policies in results.unseen_cells(kept).items()}
    assert len(means) >= 6
    ahead = [(cell, policy) for cell, policies in means.items() for policy, both in policies.items()
             if all(theirs > ours for theirs, ours in zip(both, policies["bros-plus"], strict=True))]
    assert ahead == []


# -- the code still gives them ----------------------------------------------------------------------------------------


def test_every_policy_decides_as_when_the_figures_were_measured(runs):
    measured, now = runs.read_kept()[0], runs.all_decisions()
    different = sorted(policy for policy in measured.keys() | now.keys() if measured.get(policy) != now.get(policy))
    assert not different, (f"{', '.join(different)}: decides differently than when the tables of README.md and "
                           f"docs/results.md were made: run `{MEASURE}` again, and read the text around them")


def test_the_digests_tell_every_policy_from_every_other(runs):
    """So the short runs reach the rules in which two policies differ. Two rules change nothing here by themselves: one
    needs a batch of 129, and the other prompts that are cut, as in `bros-plus`."""
    digests = runs.read_kept()[0]
    assert digests.pop("bros+seats") == digests.pop("bros+tokens") == digests["bros"]
    assert len(set(digests.values())) == len(digests)


def test_a_digest_sees_a_small_change_of_a_rule(runs, monkeypatch):
    before = {policy: runs.decisions(policy) for policy in ("bros-plus", "vllm-fcfs")}
    monkeypatch.setattr(base, "BANKED_SHARE", 0.89)
    assert runs.decisions("bros-plus") != before["bros-plus"]
    assert runs.decisions("vllm-fcfs") == before["vllm-fcfs"], "which banks no time"


def test_a_digest_sees_the_rule_that_only_long_prompts_reach(runs, monkeypatch):
    before = runs.decisions("bros-plus")
    monkeypatch.setattr(BROSScheduler, "_tokens_left_to_be", lambda *_: 0)
    assert runs.decisions("bros-plus") != before


def flat(summary):
    return {f"{group}.{key}": figure for group, keys in (*summary["classes"].items(), ("kv", summary["kv"]))
            for key, figure in keys.items()}


@pytest.mark.parametrize(("section", "name"), [
    ("headline", "OPT-13B, 4 RT/s/bros"), ("paper", "paper/opt-30b/sharegpt-rt/2/vllm-v0"),
    ("slowdown", "Llama-3-70B, 4 RT/s/2.0"), ("tiers", "OPT-13B, 4 RT/s/rt-only"),
    ("unseen", "unseen/long-14k/high load/bros-plus")])
def test_a_run_of_each_section_comes_out_as_published(runs, kept, section, name):
    chosen = runs.SECTIONS[section]
    job = chosen.jobs(None)[name]
    summary, _ = run(job.policy, replace(job.settings, seed=0), job.arrivals)
    now = flat(runs.reduced(summary, chosen.metrics))
    assert now == pytest.approx(flat(kept[section][name][0]), rel=1e-5), f"run `{MEASURE}` again"


def test_a_live_run_comes_out_as_published(results, kept):
    hybrid = results.results_hybrid
    [now] = hybrid.measure_hybrid(["vllm-priority"], 1)["vllm-priority"]
    assert flat(now) == pytest.approx(flat(kept["hybrid"]["vllm-priority"][0]), rel=1e-5), f"run `{MEASURE}` again"
    assert {policy: len(own) for policy, own in kept["hybrid"].items()} == dict.fromkeys(hybrid.POLICIES, hybrid.ROUNDS)


def test_every_job_that_needs_no_trace_is_among_the_kept(runs, kept):
    for section, chosen in runs.SECTIONS.items():
        assert kept[section].keys() >= chosen.jobs(None).keys()
        assert {len(own) for own in kept[section].values()} == {runs.SEEDS}


def test_the_command_on_the_page_prints_what_the_page_says(kept, monkeypatch, tmp_path):
    """Its first seed and its cheapest policy."""
    page = (ROOT / "docs" / "results.md").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^bros-ref (simulate .*vllm-fcfs.*)$", page, re.MULTILINE)
    words = shlex.split(line)
    for option, text in (("--seeds", "1"), ("--policies", "bros-plus")):
        words[words.index(option) + 1] = text
    monkeypatch.setattr("sys.argv", ["bros-ref", *words, "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    [summary] = json.loads((tmp_path / "out.json").read_text())["runs"]
    [published, *_] = kept["headline"]["OPT-13B, 4 RT/s/bros-plus"]
    for group in ("rt", "be"):
        for key, figure in published["classes"][group].items():
            assert summary["classes"][group][key] == pytest.approx(figure, rel=1e-5)
