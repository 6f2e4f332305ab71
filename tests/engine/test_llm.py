"""`LLM`: outputs in the order asked, for every form of input; what is refused; the state after an interrupt."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import alone, make_request

from bros_ref import LLM, SLO, RequestClass, SamplingParams, Simulation
from bros_ref.engine import llm as llm_module
from bros_ref.engine.build import load_model
from bros_ref.model.tokenizer import ByteTokenizer
from bros_ref.request import Request
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.workload import WorkloadItem
from bros_ref.workload.paper import PaperWorkload

EASY = SLO(1e3, 1e3)


def checksum_llm(**options):
    return LLM(**{"model": "checksum", "kv_blocks": 64, "latency": "online", "seed": 1, **options})


def toy_llm(**options):
    """Random weights and bytes for tokens: answers are noise, but text, sampling and templates are real."""
    return LLM("random:llama", **{"kv_blocks": 64, "latency": "online", "seed": 1, "device": "cpu", **options})


def expected(prompt, max_tokens):
    return tuple(alone(make_request("alone", False, prompt, max_tokens)))


# -- what can be asked, and what comes back ----------------------------------------------------------------------------


def test_outputs_come_in_the_order_asked_with_the_tokens_each_would_get_alone():
    prompts = [[i + 1] * (i % 5 + 1) for i in range(40)]
    outputs = checksum_llm(max_num_seqs=3).generate(prompts, SamplingParams(max_tokens=7))
    assert [output.prompt_token_ids for output in outputs] == [tuple(prompt) for prompt in prompts]
    assert [output.token_ids for output in outputs] == [expected(prompt, 7) for prompt in prompts]


@pytest.mark.parametrize(("prompts", "token_ids"), [
    ("ab", [(97, 98)]), (["ab"], [(97, 98)]), ([5, 6], [(5, 6)]), ((5, 6), [(5, 6)]), ([[5, 6]], [(5, 6)]),
    (np.array([5, 6]), [(5, 6)]), (["ab", [5, 6]], [(97, 98), (5, 6)]), ([], []),
])
def test_a_prompt_may_be_text_or_token_ids_alone_or_among_others(prompts, token_ids):
    outputs = checksum_llm().generate(prompts, SamplingParams(max_tokens=2))
    assert [output.prompt_token_ids for output in outputs] == token_ids
    assert all(type(token_id) is int for output in outputs for token_id in output.prompt_token_ids)


@pytest.mark.parametrize(("messages", "contents"), [
    ("hi", ["hi"]), ([{"role": "user", "content": "hi"}], ["hi"]),
    ([[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]], ["hi", "ho"]),
])
def test_chat_takes_one_conversation_or_several_through_the_template(messages, contents):
    outputs = checksum_llm().chat(messages, SamplingParams(max_tokens=2))
    assert [output.prompt_token_ids for output in outputs] == [tuple(ByteTokenizer().chat(text)) for text in contents]


def test_parameters_and_targets_may_differ_from_prompt_to_prompt():
    params = [SamplingParams(max_tokens=count) for count in (1, 2, 3)]
    outputs = checksum_llm().generate([[1], [2], [3]], params, [None, EASY, None])
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3]
    assert [output.request_class.value for output in outputs] == ["be", "rt", "be"]
    assert len({output.request_id for output in outputs}) == 3


def test_an_output_is_plain_frozen_and_says_what_was_measured():
    llm = checksum_llm()
    [one, four] = llm.generate([[1], [2]], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=4)], EASY)
    assert four.ttft_s > 0
    assert four.tpot_s > 0
    assert (one.tpot_s, one.finish_reason, one.num_preemptions, one.seed, one.error) == (None, "length", 0, None, None)
    times = llm.metrics()["classes"]["rt"]
    assert times["median_tpot_ms"] == pytest.approx(1e3 * four.tpot_s)
    assert times["p99_ttft_ms"] == pytest.approx(1e3 * max(one.ttft_s, four.ttft_s), rel=0.02)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.text = "other"


def test_arrivals_are_stamped_when_asked_so_a_later_call_is_not_late():
    llm = checksum_llm()
    llm.engine.clock.sleep_until(0.3)
    [output] = llm.generate([1, 2], SamplingParams(max_tokens=1), SLO(0.25, 1.0))
    assert output.ttft_s < 0.25
    assert llm.metrics()["classes"]["rt"]["slo_attainment"] == 1.0


def test_a_stream_gives_the_text_of_generate_and_leaving_it_frees_everything():
    llm, params = toy_llm(), SamplingParams(max_tokens=60)
    text = llm.generate("hello", params)[0].text
    assert len(text) > 10
    pieces = list(llm.stream("hello", params))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    stream = llm.stream("hello", params, EASY)
    next(stream)
    assert llm.engine.has_unfinished
    stream.close()
    assert not llm.engine.has_unfinished
    assert llm.engine.scheduler.kv.num_used_blocks == 0
    assert "".join(llm.stream([{"role": "user", "content": "hello"}], params)) == llm.chat("hello", params)[0].text


def test_a_stream_and_a_batch_share_the_engine():
    llm, params = toy_llm(), SamplingParams(max_tokens=40)
    text = llm.generate("hello", params)[0].text
    stream = llm.stream("hello", params)
    first = next(stream)
    assert llm.generate("hello", params)[0].text == text
    assert first + "".join(stream) == text


# -- sampling --------------------------------------------------------------------------------------------------------


def test_equal_prompts_without_a_seed_are_sampled_differently_and_any_of_them_can_be_repeated():
    llm = toy_llm()
    outputs = llm.generate(["a"] * 6, SamplingParams(max_tokens=12, temperature=40.0))
    assert len({output.token_ids for output in outputs}) == 6
    assert [llm.trace.requests[output.request_id].seed for output in outputs] == [output.seed for output in outputs]
    again = toy_llm(seed=99)  # random weights are seeded too, so take these
    again.engine.runner.model = llm.engine.runner.model
    chosen = outputs[3]
    params = SamplingParams(max_tokens=12, temperature=40.0, seed=chosen.seed)
    assert again.generate("a", params)[0].token_ids == chosen.token_ids


def test_the_seed_of_the_llm_decides_all_draws_and_without_one_two_differ():
    params = SamplingParams(max_tokens=8, temperature=40.0)
    assert toy_llm(seed=5).generate(["a", "b"], params)[1].token_ids == toy_llm(seed=5).generate(
        ["a", "b"], params)[1].token_ids
    assert checksum_llm(seed=None).trace.seed != checksum_llm(seed=None).trace.seed


# -- what is refused, what fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    ({"policy": "nope"}, "unknown policy"), ({"tp": 2}, "tp must be 1"), ({"model": "random:nope"}, "nope"),
    ({"latency": "soon"}, "online"), ({"kv_blocks": 0}, "at least one block"), ({"device": "moon"}, "moon"),
])
def test_an_impossible_system_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        checksum_llm(**options)


@pytest.mark.parametrize(("prompts", "params", "slo", "said"), [
    ([[1], []], None, None, "empty"), ([[1], [2]], [SamplingParams()], None, "2 prompts, but 1 params"),
    ([[1], [2]], None, [None], "2 prompts, but 1 slo"), ([[1], [1] * 5000], None, None, "could never finish"),
    ([[1], [5000]], None, None, "vocabulary"), ([[1], [1.5]], None, None, "text or token ids"),
    ([[{"role": "user", "content": "hi"}]], None, None, "chat"),
])
def test_a_call_with_one_impossible_prompt_runs_none_of_them(prompts, params, slo, said):
    llm = checksum_llm()
    with pytest.raises(ValueError, match=said):
        llm.generate(prompts, params, slo)
    assert not llm.engine.has_unfinished
    assert llm.engine.scheduler.kv.num_used_blocks == 0
    assert llm.generate([1], SamplingParams(max_tokens=3))[0].token_ids == expected([1], 3)


def poison(llm, request_number):
    """The model's logits for one request of the batch become NaN."""
    forward = llm.engine.runner.model.forward

    def poisoned(*args):
        logits = forward(*args).clone()
        if len(logits) > request_number:
            logits[request_number, 0] = torch.nan
        return logits

    llm.engine.runner.model = type("Poisoned", (), {"config": llm.engine.runner.model.config,
                                                    "forward": staticmethod(poisoned)})()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_own_request_by_name(temperature):
    llm = checksum_llm()
    poison(llm, 1)
    with pytest.warns(RuntimeWarning, match="1 of 2 requests failed.*not finite"):
        good, bad = llm.generate([[1], [2]], SamplingParams(max_tokens=5, temperature=temperature))
    assert (good.finish_reason, len(good.token_ids), good.error) == ("length", 5, None)
    assert (bad.finish_reason, bad.token_ids) == ("failed", ())
    assert bad.request_id in bad.error
    assert llm.trace.steps[0].finished == {bad.request_id: "failed"}
    assert not llm.engine.has_unfinished
    assert llm.engine.scheduler.kv.num_used_blocks == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_weight_that_is_not_finite_ends_a_stream_with_the_reason(value):
    llm = toy_llm()
    llm.engine.runner.model._final_norm[0] = value
    with pytest.raises(RuntimeError, match="not finite"):
        list(llm.stream("a"))


def test_an_interrupt_ends_the_call_and_the_llm_serves_the_next_one():
    llm = checksum_llm()
    execute = llm.engine.runner.execute

    def interrupted(output):
        llm.engine.runner.execute = execute
        raise KeyboardInterrupt

    llm.engine.runner.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]])
    assert not llm.engine.has_unfinished
    assert llm.generate([1], SamplingParams(max_tokens=3))[0].token_ids == expected([1], 3)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_a_pool_without_a_size_is_sized_to_the_memory_and_said(capsys):
    llm = checksum_llm(kv_blocks=None, max_num_seqs=2)
    assert llm.trace.num_blocks > 1000
    assert f"{llm.trace.num_blocks:,} blocks" in capsys.readouterr().err
    assert f"{llm.trace.num_blocks:,} KV blocks" in repr(llm)
    assert f"{4 * llm.trace.num_blocks:,} on the host" in repr(llm)
    assert "on the host" not in repr(checksum_llm(policy="vllm-fcfs"))


def test_little_memory_makes_a_small_pool_and_a_small_host_store(monkeypatch):
    loaded = load_model("random:llama", "cpu")
    block_bytes = 16 * loaded.config.kv_elements_per_token * 4
    monkeypatch.setattr("bros_ref.engine.build.available_memory_bytes", lambda: 4 * 10.5 * block_bytes)
    llm = toy_llm(kv_blocks=None)
    assert llm.trace.num_blocks == 10
    assert llm.trace.environment["host_blocks"] == 10
    assert toy_llm(kv_blocks=2).trace.environment["host_blocks"] == 8


def test_the_trace_says_where_the_latency_model_comes_from():
    given = StepLatencyModel((0.01, 0.001, 0.0, 0.0))
    assert "fitted" in checksum_llm(latency=given).trace.environment["latency_model"]
    assert "online" in checksum_llm().trace.environment["latency_model"]


def test_importing_the_package_imports_neither_torch_nor_numpy_and_no_name_is_missing():
    script = "\n".join((
        "import sys, bros_ref",
        "heavy = {'torch', 'numpy', 'scipy', 'tokenizers'} & set(sys.modules)",
        "assert not heavy and len(sys.modules) < 150, (heavy, len(sys.modules))",
        "from bros_ref import SLO, SamplingParams, RequestClass, Simulation, SimulationResult, Trace",
        "assert 'torch' not in sys.modules",
        "assert all(getattr(bros_ref, name) for name in bros_ref.__all__)",
        "assert set(bros_ref.__all__) <= set(dir(bros_ref))"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError, match="Nope"):
        from bros_ref import Nope  # noqa: F401


def test_a_simulation_runs_recipes_items_and_files_and_draws_itself(tmp_path):
    simulation = Simulation("llama-2-7b", gpu="a100-80gb", tp=1, kv_tokens=8_000)
    result = simulation.run("bros-plus", PaperWorkload(2.0, 5.0, 4), seed=3)
    assert result.trace.steps
    assert result.metrics["classes"]["rt"]["arrived"] > 0
    assert result.trace.seed == 3
    assert "simulated" in result.plot().layout.title.text
    items = [WorkloadItem(0.5, RequestClass.REAL_TIME, 20, 5, SLO(1.0, 0.5)),
             WorkloadItem(0.0, RequestClass.BEST_EFFORT, 20, 5)]
    path = tmp_path / "workload.csv"
    path.write_text("arrival_s,request_class,prompt_tokens,output_tokens,ttft_slo_s,tpot_slo_s\n"
                    "0.5,rt,20,5,1.0,0.5\n0,be,20,5,,\n")
    first, second = (simulation.run("bros", workload).metrics["classes"] for workload in (items, path))
    assert first == second
    assert first["rt"]["completed"] == first["be"]["completed"] == 1
    with pytest.raises(ValueError, match="known are"):
        Simulation("nope")


def test_an_unstamped_request_arrives_when_it_is_added():
    llm = checksum_llm()
    llm.engine.clock.sleep_until(0.05)
    request = Request("r", RequestClass.REAL_TIME, [1], slo=SLO(1.0, 1.0))
    assert request.arrival_s is None
    llm.engine.add_request(request)
    assert 0.05 <= request.arrival_s <= llm.engine.clock.now_s()
    assert request.deadline_s == request.arrival_s + 1.0
    assert llm.trace.requests["r"].arrival_s == request.arrival_s


def test_the_slowdown_that_best_effort_may_cost_reaches_the_scheduler():
    llm = LLM("random:llama", policy="bros-plus", kv_blocks=16, latency="online", rt_slowdown=1.5)
    assert llm.engine.scheduler.config.rt_slowdown == 1.5
    with pytest.raises(ValueError, match="rt_slowdown"):
        LLM("random:llama", kv_blocks=16, latency="online", rt_slowdown=0.5)


@pytest.mark.parametrize(("threads", "worth_it", "expected"), [(None, 1, 1), (None, 2, 2), (2, 1, 2)])
def test_the_threads_are_those_asked_for_or_as_many_as_are_worth_it(monkeypatch, threads, worth_it, expected):
    monkeypatch.setattr(llm_module, "compute_threads", lambda wanted: wanted or worth_it)
    before = torch.get_num_threads()
    try:
        llm = LLM("random:llama", kv_blocks=16, latency="online", threads=threads, device="cpu")
        assert torch.get_num_threads() == llm.trace.environment["threads"] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_an_impossible_number_of_threads_is_refused(threads):
    with pytest.raises(ValueError, match="threads must be at least 1, or None"):
        LLM("random:llama", kv_blocks=16, latency="online", threads=threads)
