"""A whole engine on the CUDA kernels, emulated: the tokens of the torch backend, also under KV pressure."""

import dataclasses

import pytest
import torch
from kernels.support import needs_emulator

from bros_ref.engine.build import LiveSettings, load_model, make_engine, make_runner
from bros_ref.model.backends import attention_backend
from bros_ref.request import SLO, Request, RequestClass, SamplingParams


def serve(model, backend, requests, policy="bros", kv_blocks=4, kv_dtype="auto"):
    loaded = load_model(model, "cpu", 0, backend)
    settings = LiveSettings(kv_blocks=kv_blocks, max_num_seqs=4, max_num_batched_tokens=24, chunked_prefill=True,
                            kv_dtype=kv_dtype)
    runner = make_runner(loaded, settings)
    runner.kv.data.view(torch.uint8).fill_(0xff)  # NaN in every dtype: whatever nobody wrote must not matter
    engine = make_engine(policy, loaded, runner, settings)
    made = requests(loaded)
    for request in made:
        if request.request_class is RequestClass.REAL_TIME:  # arrives while the others are under way
            engine.step()
        engine.add_request(request)
    while engine.has_unfinished:
        engine.step()
    return [request.output_token_ids for request in made], engine.trace


def question(loaded):
    prompt = loaded.tokenizer.chat("What is the capital of France?")
    return [Request("paris", RequestClass.BEST_EFFORT, prompt, SamplingParams(max_tokens=3))]


def both_classes(loaded):
    slo, sampling = SLO(10.0, 10.0), SamplingParams(max_tokens=6, ignore_eos=True)
    texts = ["a document of some length " * 2, "another one, longer than a block"]
    be = [Request(f"be{i}", RequestClass.BEST_EFFORT, loaded.tokenizer.encode(text), sampling)
          for i, text in enumerate(texts)]
    return be + [Request(f"rt{i}", RequestClass.REAL_TIME, loaded.tokenizer.encode(text), sampling, slo=slo)
                 for i, text in enumerate(["hello", "seventeen tokens."])]


@needs_emulator
def test_smollm2_says_the_same_through_the_emulated_kernels():
    kernels, _ = serve("smollm2", "cpu-emulated", question)
    assert kernels == serve("smollm2", "torch", question)[0]
    assert len(kernels[0]) == 3


@needs_emulator
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("model", ["random:llama", "random:opt"], ids=["fused kernels", "attention only"])
def test_a_hybrid_run_under_pressure_gives_the_same_tokens(model, kv_dtype):
    kernels, trace = serve(model, "cpu-emulated", both_classes, kv_dtype=kv_dtype)
    assert kernels == serve(model, "torch", both_classes, kv_dtype=kv_dtype)[0]
    assert any(len({name[:2] for name in step.scheduled}) == 2 for step in trace.steps), "both classes in one launch"
    assert max(step.used_blocks for step in trace.steps) == 4, "the pool was full"
    assert sum(step.copied["restore"] for step in trace.steps) > 0, "overwritten slots came back"


def test_an_fp8_cache_of_the_kernels_needs_rows_of_whole_pieces():
    loaded = load_model("random:llama", "cpu", 0, "cpu-emulated")
    narrow = dataclasses.replace(loaded.config, head_dim=24)
    loaded.model.config = narrow
    with pytest.raises(ValueError, match="a multiple of 16, not 24"):
        make_runner(loaded, LiveSettings(kv_blocks=4, kv_dtype="fp8"))


def test_a_backend_must_fit_its_device():
    with pytest.raises(ValueError, match="known are auto, torch, cupy, cpu-emulated"):
        attention_backend("triton")
    with pytest.raises(ValueError, match="does not run on device cpu"):
        attention_backend("cupy", "cpu")
    with pytest.raises(ValueError, match="does not run on device cuda"):
        attention_backend("cpu-emulated", "cuda")

