"""K and V in FP8: what is stored, what attention makes of it, and that serving moves it without changing it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bros_ref import LLM, SLO, SamplingParams
from bros_ref.config import KVCacheConfig
from bros_ref.engine.build import LiveSettings, blocks_that_fit, load_model, make_runner
from bros_ref.engine.kv_dtype import HEADROOM, fp8_scales, storage_dtype
from bros_ref.evaluation.bench.kv_dtype import perplexities, python_reference
from bros_ref.kv_cache.storage import FP8, FP8_MAX, KVStorage, to_fp8
from bros_ref.model.attention import AttentionMetadata, dense_attention, paged_attention
from bros_ref.model.checksum import ChecksumModel
from bros_ref.request import Request, RequestClass

EVERY_VALUE = torch.arange(256, dtype=torch.uint8).view(FP8).float()


@given(x=st.floats(-2000, 2000, width=32), power=st.integers(-6, 6))
def test_a_value_becomes_the_nearest_that_the_format_has(x, power):
    scale = 2.0 ** power
    stored = to_fp8(torch.tensor([x]), scale).float() * scale
    distances = (EVERY_VALUE[EVERY_VALUE.isfinite()] * scale - x).abs()
    assert abs(stored.item() - x) == distances.min().item()
    assert stored.isfinite().all()


def test_what_exceeds_the_range_becomes_its_end_and_nan_stays_nan():
    x = torch.tensor([FP8_MAX, 449.0, 1e30, math.inf, -math.inf, math.nan])
    stored = to_fp8(x, 1.0).float()
    assert stored[:5].tolist() == [448, 448, 448, 448, -448]
    assert stored[5].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_computes_with_the_stored_values(dtype):
    """A mixed batch in both directions: as with a cache that holds the same values in the dtype of the queries."""
    generator = torch.Generator().manual_seed(3)
    tables, flips = [[2, 0], [1, 3], [5]], [False, True, True]
    meta = AttentionMetadata.build(tables, flips, [1, 5, 1], [7, 6, 3], 4)
    cache = torch.randn(2, 6, 4, 2, 8, generator=generator).to(FP8)
    q = torch.randn(7, 4, 8, generator=generator).to(dtype)
    got = paged_attention(q, cache[0], cache[1], meta)
    assert got.dtype == dtype
    assert torch.equal(got, paged_attention(q, cache[0].to(dtype), cache[1].to(dtype), meta))
    wanted = dense_attention(q, cache[0], cache[1], meta, torch.float64)
    torch.testing.assert_close(got, wanted, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_the_scales_are_powers_of_two_that_leave_headroom_for_what_was_seen():
    model = load_model("random:llama", "cpu", seed=1).model
    runner = make_runner(load_model("random:llama", "cpu", seed=1), LiveSettings(kv_blocks=16, kv_dtype="fp8"))
    assert runner.kv.scales == fp8_scales(model)
    for scales in runner.kv.scales:
        assert all(math.log2(scale).is_integer() for scale in scales)
    plain = make_runner(load_model("random:llama", "cpu", seed=1), LiveSettings(kv_blocks=16))
    assert set(plain.kv.scales) == {(1.0, 1.0)}
    for layer, scales in enumerate(runner.kv.scales):  # random tokens of another seed fit as well
        for other_seed in (1, 2):
            for ours, other in zip(scales, fp8_scales(model, other_seed)[layer], strict=True):
                assert other <= HEADROOM * ours


def test_the_factors_are_part_of_what_the_model_computes():
    """With factors for the range of values the logits stay close; with factors that saturate they do not."""
    loaded = load_model("random:llama", "cpu", seed=1)
    tokens = list(range(40))

    def logits(kv_dtype, scales=None):
        runner = make_runner(loaded, LiveSettings(kv_blocks=4, kv_dtype=kv_dtype))
        if scales is not None:
            runner.kv.scales = [scales] * loaded.config.num_layers
        meta = AttentionMetadata.build([[0, 1, 2]], [True], [40], [40], 16)
        return loaded.model.forward(torch.tensor(tokens), meta.positions, runner.kv, meta, torch.arange(40))

    exact = logits("auto")

    def error(*arguments):
        return ((logits(*arguments) - exact).norm() / exact.norm()).item()

    measured = error("fp8")
    assert 0 < measured < 0.1
    assert error("fp8", (1.0, 1.0)) < 0.1
    assert error("fp8", (2.0 ** -10, 1.0)) > 2 * measured
    assert error("fp8", (1.0, 2.0 ** -10)) > 2 * measured


@pytest.mark.parametrize("policy", ["bros", "bros-plus", "bros-swap-request", "vllm-priority"])
def test_tokens_are_the_same_however_the_cache_is_shared_and_moved(policy):
    """RT arrive when BE fill a pool of ten blocks, so that slots are checkpointed, relocated and restored."""
    def serve(policy, kv_blocks):
        llm = LLM("random:llama", policy=policy, kv_blocks=kv_blocks, latency="online", seed=1, device="cpu",
                  kv_dtype="fp8", max_num_seqs=4)
        assert llm.trace.environment["kv_dtype"] == "float8_e4m3fn"
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        requests = [Request(str(i), RequestClass.REAL_TIME if i > 2 else RequestClass.BEST_EFFORT,
                            list(range(i, i + 40)), params, slo=SLO(1e3, 1e3) if i > 2 else None) for i in range(6)]
        for request in requests[:3]:
            llm.engine.add_request(request)
        for _ in range(12):
            llm.engine.step()
        for request in requests[3:]:
            llm.engine.add_request(request)
        while llm.engine.has_unfinished:
            llm.engine.step()
        return [list(request.output_token_ids) for request in requests], llm.metrics()["kv"]

    got, kv = serve(policy, 10)
    assert got == serve("vllm-fcfs", 64)[0]
    if policy.startswith("bros"):
        assert kv["restored_slots"] > 0
    else:
        assert kv["recomputed_tokens"] > 0


def test_storage_moves_bytes_between_device_and_host():
    kv = KVStorage(2, 1, 4, KVCacheConfig(2, 4, 2), FP8)
    bytes_ = torch.randint(256, kv.data.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kv.data.view(torch.uint8).copy_(bytes_)
    kv.run_copies(checkpoint=[(1, 3), (2, 4)], relocate=[(1, 6)], restore=[(3, 0)])
    after = kv.data.view(torch.uint8).flatten(2, 3)
    before = bytes_.flatten(2, 3)
    assert torch.equal(after[:, :, [6, 0]], before[:, :, [1, 1]])
    assert torch.equal(after[:, :, [1, 2, 3, 4, 5, 7]], before[:, :, [1, 2, 3, 4, 5, 7]])
    assert kv.host_data.dtype == FP8
    assert torch.equal(kv.host_data.view(torch.uint8)[:, :, [3, 4]], before[:, :, [1, 2]])
    assert kv.slot_bytes == 2 * 2 * 4


def test_as_much_memory_holds_four_times_the_tokens_of_float32(monkeypatch):
    loaded = load_model("random:llama", "cpu")
    one_block = 16 * loaded.config.kv_elements_per_token * 4
    monkeypatch.setattr("bros_ref.engine.build.available_memory_bytes", lambda: 4 * 3 * one_block)
    assert blocks_that_fit(loaded, 16, 32) == 3
    assert blocks_that_fit(loaded, 16, 32, "fp8") == 12


def test_what_cannot_have_fp8_is_refused():
    with pytest.raises(ValueError, match="auto or fp8, not 'int4'"):
        storage_dtype("int4", torch.float32)
    with pytest.raises(ValueError, match="auto or fp8"):
        LLM("random:llama", kv_blocks=8, latency="online", kv_dtype="e5m2")
    checksum = load_model("checksum")
    assert isinstance(checksum.model, ChecksumModel)
    with pytest.raises(ValueError, match=r"computes in floating point; this one has torch\.int64"):
        make_runner(checksum, LiveSettings(kv_blocks=8, kv_dtype="fp8"))
    split = dataclasses.replace(load_model("random:llama", "cpu"), ranks=object())  # refused before a rank is asked
    with pytest.raises(ValueError, match="split over devices cannot have an fp8 KV cache"):
        make_runner(split, LiveSettings(kv_blocks=8, kv_dtype="fp8"))


def test_perplexity_is_that_of_the_text_and_fp8_changes_it_a_little():
    loaded = load_model("random:llama", "cpu", seed=1)
    plain, fp8 = perplexities(loaded, 3, 64)
    assert (plain.kv_dtype, fp8.kv_dtype, plain.excess_percent) == ("auto", "fp8", None)
    assert plain.bytes_per_token == 4 * fp8.bytes_per_token == 4 * loaded.config.kv_elements_per_token
    mean, half = fp8.excess_percent
    assert 0 < abs(mean) < 5
    assert half > 0
    assert fp8.perplexity / plain.perplexity == pytest.approx(1 + mean / 100)
    # by hand: the second token's probability, and so on
    token_ids = loaded.tokenizer.encode(python_reference())
    stride = len(token_ids) // 3
    losses = []
    for start in (0, stride, 2 * stride):
        window = token_ids[start:start + 64]
        runner = make_runner(loaded, LiveSettings(kv_blocks=4))
        meta = AttentionMetadata.build([[0, 1, 2, 3]], [False], [64], [64], 16)
        log_p = loaded.model.forward(torch.tensor(window), meta.positions, runner.kv, meta,
                                     torch.arange(64)).double().log_softmax(-1)
        losses.append(-sum(log_p[i, window[i + 1]].item() for i in range(63)) / 63)
    assert plain.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    with pytest.raises(ValueError, match="the text has"):
        perplexities(loaded, 10_000, 64)
