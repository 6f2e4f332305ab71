"""The GPU runner on emulated kernels: the tokens of the readable decoder, launch by launch and replayed as graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernels.support import needs_emulator

from bros_ref.config import KVCacheConfig
from bros_ref.engine.build import LiveSettings, LoadedModel, load_model, make_engine, make_runner
from bros_ref.engine.llm_engine import RequestsFailed
from bros_ref.engine.model_runner import ModelRunner, NonFiniteLogits, StepWork
from bros_ref.engine.profile import _batch_output
from bros_ref.gpu.attention import KernelAttention
from bros_ref.gpu.decoder import KernelDecoder, why_not_fused
from bros_ref.gpu.runner import KernelRunner
from bros_ref.kv_cache.blocks import CopyPlan
from bros_ref.kv_cache.storage import FP8
from bros_ref.model.decoder import Decoder
from bros_ref.model.tokenizer import ByteTokenizer
from bros_ref.model.weights.load import load_model_config
from bros_ref.model.weights.parameters import random_parameters
from bros_ref.request import SLO, Request, RequestClass, SamplingParams
from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.recording import Recorder

pytestmark = needs_emulator
HALF, FLOAT = torch.float16, torch.float32
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def pair(family, dtype, capture=None, checks=True, kv_dtype=None, **more):
    """A runner of fused kernels, and one of the readable decoder, on the same weights."""
    config = dataclasses.replace(load_model_config(f"random:{family}"), **more)
    weights = random_parameters(config, 3, dtype)
    pool = KVCacheConfig(16, 16, 64)
    fast = KernelDecoder(config, weights, dtype, "cpu", KernelAttention(Emulator(checks=checks)))
    return (KernelRunner(fast, pool, "cpu", kv_dtype or dtype, "cpu-emulated", capture),
            ModelRunner(Decoder(config, weights, dtype, "cpu"), pool, "cpu", kv_dtype or dtype))


def random_work(rng, queries, contexts, block_size=16):
    """A step of sequences with these lengths, in blocks drawn at random; all last rows are wanted."""
    order = rng.permutation(16).tolist()
    tables = [[order.pop() for _ in range(-(-context // block_size))] for context in contexts]
    ends = [sum(queries[:i + 1]) - 1 for i in range(len(queries))]
    return StepWork(rng.integers(3, 250, sum(queries)).tolist(), tables, [bool(rng.integers(2)) for _ in queries],
                    list(queries), list(contexts), ends, list(range(len(queries))), CopyPlan())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("queries", "contexts"), [
    ([1], [1]), ([1, 1, 1], [5, 40, 17]), ([3, 16], [3, 30]), ([1, 1, 7], [20, 3, 7])],
    ids=["one", "decodes", "prefills", "mixed"])
def test_logits_are_those_of_the_readable_decoder(rng, family, queries, contexts):
    fast, plain = pair(family, FLOAT)
    values = torch.from_numpy(rng.standard_normal(tuple(plain.kv.data.shape))).float()
    for runner in (fast, plain):
        runner.kv.data.copy_(values)
    work = random_work(rng, queries, contexts)
    found, wanted = fast.compute(work), plain.compute(work)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.kv.data, plain.kv.data, rtol=1e-4, atol=1e-4)
    written = [(runner.kv.data != values).flatten(4).any(-1) for runner in (fast, plain)]
    assert torch.equal(*written), "the same slots, and no other"


def test_tensor_cores_too(rng):
    fast, plain = pair("llama", HALF, head_dim=64, rotary_dim=None)
    work = random_work(rng, [1, 1, 5], [20, 3, 9])
    found, wanted = fast.compute(work), plain.compute(work)
    error = (found - wanted).norm() / wanted.norm()
    assert error < 5e-3


SCALES = [(0.5, 0.25), (2.0, 1.0), (1.0, 0.125)]  # of the three layers' K and V


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("queries", "contexts"), [
    ([1, 1, 1], [5, 40, 17]), ([3, 16], [3, 30]), ([1, 1, 7], [20, 3, 7])], ids=["decodes", "prefills", "mixed"])
def test_an_fp8_cache_is_written_and_read_as_by_the_readable_decoder(rng, family, queries, contexts):
    fast, plain = pair(family, FLOAT, kv_dtype=FP8)
    values = torch.from_numpy(rng.standard_normal(tuple(plain.kv.data.shape))).float().to(FP8)
    for runner in (fast, plain):
        runner.kv.data.copy_(values)
        runner.kv.scales = SCALES
    work = random_work(rng, queries, contexts)
    found, wanted = fast.compute(work), plain.compute(work)
    assert (found - wanted).norm() < 2e-2 * wanted.norm()
    stored = [runner.kv.data.view(torch.uint8) for runner in (fast, plain)]
    written = [(bytes_ != values.view(torch.uint8)).flatten(4).any(-1) for bytes_ in stored]
    assert torch.equal(*written), "the same slots, and no other"
    other = (stored[0] != stored[1]).sum().item()  # values that lie between two that the format has
    assert other <= 0.01 * written[0].sum().item() * stored[0][0, 0, 0, 0].numel()


def requests_of_both_classes(temperature=0.0):
    sampling = SamplingParams(max_tokens=6, ignore_eos=True, temperature=temperature, seed=7, top_p=0.9)
    be = [Request(f"be{i}", RequestClass.BEST_EFFORT, list(range(5, 37 + i)), sampling) for i in range(2)]
    return [*be, *(Request(f"rt{i}", RequestClass.REAL_TIME, list(range(9, 20 + i)), sampling, slo=SLO(10.0, 10.0))
                   for i in range(2))]


def served(runner, requests):
    """Tokens of a run under KV pressure; real-time requests arrive while the others are under way."""
    config = runner.model.config
    loaded = LoadedModel("random", runner.model, ByteTokenizer(), torch.device("cpu"), FLOAT, {}, runner.backend)
    settings = LiveSettings(kv_blocks=runner.kv.config.num_blocks, max_num_seqs=4, max_num_batched_tokens=24,
                            chunked_prefill=True)
    engine = make_engine("bros", loaded, runner, settings)
    for request in requests:
        if request.request_class is RequestClass.REAL_TIME:
            engine.step()
            engine.step()
        engine.add_request(request)
    while engine.has_unfinished:
        engine.step()
    assert config is runner.model.config
    return [request.output_token_ids for request in requests], engine.trace


def small_pool(runner_type, *args, kv_dtype=FLOAT):
    config = load_model_config("random:llama")
    weights = random_parameters(config, 0, FLOAT)
    pool = KVCacheConfig(5, 16, 20)
    if runner_type is ModelRunner:
        return scaled(ModelRunner(Decoder(config, weights, FLOAT, "cpu"), pool, dtype=kv_dtype))
    emulator, capture = Emulator(checks=False), None
    kernels = emulator
    if args:
        kernels = Recorder("cpu", runs=emulator)
        capture = args[0](kernels)
    model = KernelDecoder(config, weights, FLOAT, "cpu", KernelAttention(kernels))
    return scaled(KernelRunner(model, pool, "cpu", kv_dtype, "cpu-emulated", capture))


def scaled(runner):
    """With factors for K and V, if its cache is FP8."""
    if runner.kv.data.dtype == FP8:
        runner.kv.scales = SCALES
    return runner


class ReplayedCalls:
    """Captures as a CUDA graph does: the calls of the body, to be made again on the same tensors."""

    def __init__(self, recorder):
        self.recorder, self.captured, self.replayed = recorder, 0, 0

    def __call__(self, body):
        with self.recorder:
            body()  # as on a GPU: once to load what is needed
            self.recorder.clear()
            body()
        again = self.recorder.replay()
        self.captured += 1

        def replay():
            self.replayed += 1
            again()

        return replay


@pytest.mark.parametrize("kv_dtype", [FLOAT, FP8], ids=str)
def test_graphs_give_the_same_tokens_and_are_replayed(kv_dtype):
    captures = []

    def capture(recorder):
        captures.append(ReplayedCalls(recorder))
        return captures[0]

    wanted, trace = served(small_pool(ModelRunner, kv_dtype=kv_dtype), requests_of_both_classes())
    found, _ = served(small_pool(KernelRunner, capture, kv_dtype=kv_dtype), requests_of_both_classes())
    assert found == wanted
    assert captures[0].captured >= 2, "buckets of several sizes"
    assert captures[0].replayed >= captures[0].captured
    assert sum(step.copied["restore"] for step in trace.steps) > 0, "overwritten slots came back"


def test_a_graph_with_an_allocation_is_refused():
    recorder = Recorder("cpu")
    with pytest.raises(RuntimeError, match="cannot hold allocations"):
        ReplayedCalls(recorder)(lambda: torch.zeros(3).add(1))


def test_draws_are_repeated_by_their_seed():
    first, _ = served(small_pool(KernelRunner), requests_of_both_classes(50.0))
    again, _ = served(small_pool(KernelRunner), requests_of_both_classes(50.0))
    greedy, _ = served(small_pool(KernelRunner), requests_of_both_classes())
    assert first == again
    assert first != greedy


def test_logits_that_are_not_finite_fail_their_own_request():
    runner = small_pool(KernelRunner)
    output = _batch_output([(1, 15)] * 3, runner.kv.config)
    runner.kv.data.fill_(0)
    blocks = output.block_tables[1]
    runner.kv.data[:, 1, blocks] = torch.inf
    with pytest.raises(RequestsFailed) as failed:
        runner.execute(output)
    assert list(failed.value.errors) == [1]
    assert isinstance(failed.value.errors[1], NonFiniteLogits)
    assert [token is None for token in failed.value.token_ids] == [False, True, False]


def test_penalties_and_logprobs_are_those_of_the_reference():
    def asked():
        sampling = SamplingParams(max_tokens=5, ignore_eos=True, frequency_penalty=2.0, logprobs=2)
        return [Request("one", RequestClass.BEST_EFFORT, list(range(5, 30)), sampling)]

    ours, theirs = asked(), asked()
    assert served(small_pool(KernelRunner), ours)[0] == served(small_pool(ModelRunner), theirs)[0]
    for mine, other in zip(ours[0].logprobs, theirs[0].logprobs, strict=True):
        assert mine.token_id == other.token_id
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_the_builder_takes_it_where_kernels_compute_attention():
    loaded = load_model("random:llama", "cpu", 0, "cpu-emulated")
    assert type(make_runner(loaded, LiveSettings(kv_blocks=4))) is KernelRunner
    plain = load_model("random:opt", "cpu", 0, "cpu-emulated")
    assert type(make_runner(plain, LiveSettings(kv_blocks=4))) is ModelRunner
    assert type(make_runner(load_model("random:llama", "cpu"), LiveSettings(kv_blocks=4))) is ModelRunner


@pytest.mark.parametrize(("change", "said"), [
    ({}, None), ({"mlp": "relu"}, "relu"), ({"norm": "layer"}, "layer"), ({"positions": "learned"}, "learned"),
    ({"hidden_size": 63}, "63"), ({"intermediate_size": 100}, "100"), ({"head_dim": 260}, "260")])
def test_models_that_it_does_not_compute_are_named(change, said):
    reason = why_not_fused(dataclasses.replace(load_model_config("random:llama"), **change), HALF)
    assert reason is None if said is None else said in reason
