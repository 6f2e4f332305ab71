"""What-if: the picture and the words are those of the answer, each question is asked once, a wrong one is refused."""

import json
import re
import time
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.simulator.simulate import SimulationSettings, run
from bros_ref.viz.widgets.what_if import LEFT, PLANE_H, PLANE_W, TOP, Choice, WhatIf, answers_svg, facts, sentence
from bros_ref.workload.paper import PaperWorkload, be_batch_for

MAX_ANSWER_CPU_S = 1.0 * 2  # a second on a quiet machine; a test machine is not
CHOICES = (Choice("rate", "RT a second", (1, 2.5, 10), "/s"), Choice("policy", "policy", ("vllm-fcfs", "bros")))


def answer(policy="bros", on_time=0.5, be_rate=100.0, ttft_ms=80.0):
    rt = {"slo_attainment": on_time, "median_ttft_ms": ttft_ms, "p99_ttft_ms": None if ttft_ms is None else 2 * ttft_ms,
          "median_tpot_ms": 20.0, "p99_tpot_ms": 30.0}
    return {"policy": policy, "classes": {"rt": rt, "be": {"output_throughput": be_rate, "max_wait_s": 1.5}},
            "kv": {"num_blocks": 3200, "peak_usage": 0.875, "recomputed_tokens": 1234}}


def asked(log):
    def ask(question):
        log.append(dict(question))
        if question["rate"] == 2.5:
            raise ValueError("a rate of 2.5 is never answered here")
        return answer(question["policy"], be_rate=10.0 * question["rate"])
    return ask


def widget(log=None):
    return WhatIf(CHOICES, asked([] if log is None else log), [{"rate": 10, "policy": "bros"},
                                                               {"rate": 1, "policy": "vllm-fcfs"}])


@given(st.lists(st.tuples(st.sampled_from(["vllm-fcfs", "bros"]), st.floats(0, 1), st.floats(0, 5000)), min_size=1,
                max_size=6), st.data())
def test_the_chosen_answer_is_where_its_numbers_say(drawn, data):
    answers = [answer(*one) for one in drawn]
    chosen = data.draw(st.integers(0, len(answers) - 1))
    root = ElementTree.fromstring(answers_svg(answers, chosen, ["vllm-fcfs", "bros"]))
    [ring] = root.iter("{http://www.w3.org/2000/svg}circle")
    most = max(1.0, *(one[2] for one in drawn)) * 1.1
    _, on_time, be_rate = drawn[chosen]
    assert float(ring.get("cx")) == pytest.approx(LEFT + PLANE_W * be_rate / most, abs=0.06)
    assert float(ring.get("cy")) == pytest.approx(TOP + PLANE_H * (1 - on_time), abs=0.06)
    titles = [path.find("{http://www.w3.org/2000/svg}title") for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert sorted(title.text for title in titles if title is not None) == sorted(
        f"{one['policy']}: {facts(one)['RT on time']} of RT on time, BE {facts(one)['BE output']}" for one in answers)
    assert root.get("aria-label") == sentence(answers[chosen])


def test_the_words_say_what_is_missing():
    assert facts(answer())["RT TTFT median, p99"] == "80 ms, 160 ms"
    assert facts(answer(on_time=None, ttft_ms=None)) == {
        **facts(answer()), "RT on time": "no RT arrived", "RT TTFT median, p99": "no sample"}


def test_each_question_is_asked_once_and_by_its_values():
    log = []
    made = widget(log)
    assert log == [{"rate": 10, "policy": "bros"}, {"rate": 1, "policy": "vllm-fcfs"}]
    key, picture, words = made.reply("0 1")
    assert log[2:] == [{"rate": 1, "policy": "bros"}]
    assert (key, picture) == ("0 1", made.picture("0 1"))
    assert "BE output 10 tokens/s" in words
    assert "answered in" in words
    assert made.reply("0 1")[2] == sentence(made.answers["0 1"])
    assert len(log) == 3


def test_a_refusal_is_shown_with_its_reason():
    made = widget()
    assert made.reply("1 0") == ["1 0", "", "there is no answer: a rate of 2.5 is never answered here"]
    assert "1 0" not in made.answers


def test_the_page_is_one_piece_and_opens_on_the_first_question():
    made = widget()
    page = made.to_html()
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(packed)["known"] == {key: [made.picture(key), sentence(made.answers[key])]
                                           for key in ("2 1", "0 0")}
    assert made.still() == made.picture("2 1")
    assert page.count(made.still()) == 1, "shown without a script; in the data its quotes are escaped"
    assert 'aria-valuetext="10 /s"' in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_in_a_kernel_the_question_is_answered_through_the_model():
    made = widget()
    live = made.live()
    live.question = "0 1"
    assert live.reply == ["0 1", made.picture("0 1"), live.reply[2]]
    bundle = made._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "text/plain", "text/html"}
    assert bundle["text/plain"] == "what if: 2 choices, 3 settings answered beforehand"


@pytest.mark.parametrize(("choices", "beforehand", "says"), [
    (CHOICES[:1], [{"rate": 1}], "must be named 'policy'"),
    (CHOICES, [], "at least one question"),
    (CHOICES, [{"rate": 3, "policy": "bros"}], "rate: 3 is not offered"),
    (CHOICES, [{"policy": "bros"}], "a question gives rate, policy"),
])
def test_what_could_not_work_is_refused_before_anything_is_asked(choices, beforehand, says):
    log = []
    with pytest.raises(ValueError, match=says):
        WhatIf(choices, asked(log), beforehand)
    assert log == []


def test_no_limit_is_a_value_like_any_other():
    limit = Choice("x", "at most", (None, 1.5), "times")
    assert [limit.shown(i) for i in (0, 1)] == ["none", "1.5 times"]
    made = WhatIf((*CHOICES, limit), asked([]), [{"rate": 10, "policy": "bros", "x": None}])
    assert made.question("2 1 0")["x"] is None
    assert 'data-shown="none|1.5 times" aria-valuetext="none"' in made.to_html()


def test_a_choice_without_values_is_refused():
    with pytest.raises(ValueError, match="no values"):
        Choice("rate", "rate", ())


@pytest.mark.parametrize("policy", ["vllm-priority", "bros-rr", "bros"])
def test_the_simulator_answers_while_one_waits(policy):
    """The heaviest corner of the settings that notebook 06 offers."""
    settings = SimulationSettings("a100-40gb", "opt-13b", 2, kv_tokens=51_408)
    start_s = time.process_time()
    summary, _ = run(policy, settings, PaperWorkload(10.0, 20.0, be_batch_for(51_408)))
    assert time.process_time() - start_s < MAX_ANSWER_CPU_S
    assert facts(summary)["RT on time"].endswith("%")
