"""On a GPU: every kernel, dtype and direction against float64, large shared memory, graph capture, copies, an engine.

It needs no C++ compiler, and is skipped, and counted, where no GPU or no CuPy is.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels_cupy.device import FOLDER
from kernels_cupy.gpu import CupyDevice, why_unavailable
from kernels_cupy.heads import FP8, Heads
from kernels_cupy.launch import STEPS, Problem, copy_slots, paged_attention, store_kv, why_not
from kernels_cupy.proof.contract import FP8_SCALES, Batch, decode, prefill
from kernels_cupy.proof.fused import check_add_norm, check_rope_store, check_silu_mul, check_store_fp8

NO_GPU = why_unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=f"not measured here: {NO_GPU}")]
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SHAPES = [(8, 2, 64, 16), (16, 2, 128, 16), (4, 4, 80, 32), (12, 1, 96, 16), (4, 2, 256, 16), (14, 2, 64, 256),
          (4, 2, 64, 5)]
LENGTHS = [1, 15, 16, 17, 100, 700, 33, 256, 257]


@pytest.fixture(scope="module")
def device():
    return CupyDevice()


def drawn(rng, heads, query_lens=None, directions=None, lengths=LENGTHS):
    return Batch.draw(rng, heads, query_lens or [1] * len(lengths), lengths, directions).to("cuda")


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_decode_step(device, rng, shape, dtype):
    heads, ran = Heads(*shape, dtype), 0
    for directions in (None, [False] * len(LENGTHS), [True] * len(LENGTHS)):
        batch = drawn(rng, heads, directions=directions)
        for step in STEPS:
            if why_not(step, Problem(heads, len(LENGTHS), batch.tables.shape[1]), device.gpu) is None:
                batch.check(decode(device, batch, step, num_sms=device.gpu.num_sms))
                ran += 1
    assert ran >= 3 * 3


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_prefills(device, rng, shape, dtype):
    queries = [int(rng.integers(1, length + 1)) for length in LENGTHS]
    for directions in (None, [False] * len(LENGTHS), [True] * len(LENGTHS)):
        batch = drawn(rng, Heads(*shape, dtype), queries, directions)
        for fast in (True, False):
            batch.check(prefill(device, batch, fast))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_fp8_cache(device, rng, shape, dtype):
    heads, ran = Heads(*shape, dtype, FP8), 0
    queries = [int(rng.integers(1, length + 1)) for length in LENGTHS]
    for directions in (None, [False] * len(LENGTHS), [True] * len(LENGTHS)):
        batch = drawn(rng, heads, directions=directions)
        for step in (3, 5):
            if why_not(step, Problem(heads, len(LENGTHS), batch.tables.shape[1]), device.gpu) is None:
                batch.check(decode(device, batch, step, num_sms=device.gpu.num_sms))
                ran += 1
        batch = drawn(rng, heads, queries, directions)
        for fast in (True, False):
            batch.check(prefill(device, batch, fast))
    assert ran >= 3


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_rows_of_an_fp8_cache(device, rng, dtype):
    values = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype) if dtype is not FLOAT else \
        torch.from_numpy(rng.standard_normal(1 << 16)).float() * 100
    values = torch.where(values.isnan(), 0, values).view(-1, 2, 64).cuda()
    check_store_fp8(lambda *tensors: store_kv(device, *tensors, *FP8_SCALES), values, FP8_SCALES)
    for shape, rotary, qk_norm in (((8, 2, 64, 16), 64, False), ((3, 1, 80, 5), 32, True)):
        check_rope_store(device, rng, Heads(*shape, dtype, FP8), 17, rotary, qk_norm, "cuda")


def test_more_than_48_kb_of_shared_memory(device, rng):
    batch = drawn(rng, Heads(2, 1, 64, 16, HALF), lengths=[14_000, 5])
    batch.check(decode(device, batch, 2))


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_captured_graph_reads_what_lies_in_memory_when_it_is_replayed(device, rng, step):
    heads = Heads(8, 2, 64, 16, HALF)
    first, second = (drawn(rng, heads, directions=[False, True] * 4 + [False]) for _ in range(2))
    out = torch.empty_like(first.q)

    def call():
        paged_attention(device, first.q, first.k, first.v, *first.integers(), out, step=step, num_splits=3)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    first.check(out)
    for name in ("q", "k", "v", "tables", "lengths", "reversed"):
        getattr(first, name).copy_(getattr(second, name))
    out.fill_(torch.nan)
    graph.replay()
    second.check(out)


def test_rows_and_slots_are_copied(device, rng):
    rows = [torch.from_numpy(rng.standard_normal((7, 2, 64))).half().cuda() for _ in range(2)]
    caches = [torch.full((3, 16, 2, 64), torch.nan, dtype=HALF, device="cuda") for _ in range(2)]
    slots = torch.from_numpy(rng.permutation(48)[:7].astype(np.int32)).cuda()
    store_kv(device, *rows, slots, *caches)
    for row, cache in zip(rows, caches, strict=True):
        assert torch.equal(cache.view(48, 2, 64)[slots.long()], row)
        assert int(cache.view(48, 2, 64).isnan().all(dim=2).all(dim=1).sum()) == 41
    store = torch.from_numpy(rng.standard_normal((3, 2, 20, 2, 64))).half().cuda()
    host = torch.zeros(3, 2, 30, 2, 64, dtype=HALF).pin_memory()
    back, pairs = torch.zeros_like(store), torch.tensor([[4, 29], [0, 0], [19, 7]], dtype=torch.int32).cuda()
    copy_slots(device, store, host, pairs)
    copy_slots(device, host, back, pairs.flip(1).contiguous())
    torch.cuda.synchronize()
    for there, here in ((4, 29), (0, 0), (19, 7)):
        assert torch.equal(host[:, :, here], store[:, :, there].cpu())
        assert torch.equal(back[:, :, there], store[:, :, there])


def test_a_tensor_of_the_host_is_refused(device):
    row = torch.zeros(1, 2, 64, dtype=HALF)
    with pytest.raises(ValueError, match="pinned"):
        store_kv(device, row, row, torch.zeros(1, dtype=torch.int32), row[None].clone(), row[None].clone())


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_the_fused_kernels(device, rng, dtype):
    for shape, rotary, qk_norm in (((8, 2, 64, 16), 64, False), ((32, 8, 128, 16), 128, True),
                                   ((3, 1, 80, 5), 32, True)):
        for num_tokens in (1, 17, 1000):
            check_rope_store(device, rng, Heads(*shape, dtype), num_tokens, rotary, qk_norm, "cuda")
    for rows, hidden in ((1, 576), (33, 4096), (5, 8192)):
        check_add_norm(device, rng, rows, hidden, dtype, True, "cuda")
        check_add_norm(device, rng, rows, hidden, dtype, False, "cuda")
        check_silu_mul(device, rng, rows, 3 * hidden, dtype, "cuda")


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_sequences_of_no_tokens_are_padding_to_every_step(device, rng, dtype):
    batch = drawn(rng, Heads(8, 2, 64, 16, dtype))
    real = len(LENGTHS)
    q, out = torch.cat([batch.q, batch.q]), torch.full((2 * real, 8, 64), torch.nan, dtype=dtype, device="cuda")
    tables, lengths, flips = (torch.cat([part, torch.zeros_like(part)]) for part in batch.integers())
    for step in (3, 4, 5):
        paged_attention(device, q, batch.k, batch.v, tables, lengths, flips, out, step=step)
        batch.check(out[:real])


def test_copies_on_the_side_stream_equal_the_reference_s(device, rng):
    from bros_ref.config import KVCacheConfig
    from bros_ref.gpu.copies import KernelKVStorage
    from bros_ref.kv_cache.storage import KVStorage

    config, place = KVCacheConfig(6, 4, 5), torch.device("cuda")
    fast, plain = KernelKVStorage(3, 2, 8, config, HALF, place, device), KVStorage(3, 2, 8, config, HALF, place)
    values = torch.from_numpy(rng.standard_normal(tuple(plain.data.shape))).half()
    for kv in (fast, plain):
        kv.data.copy_(values)
    for _ in range(50):
        counts = rng.integers(0, 5, 3)
        lists = {name: list(zip(rng.integers(0, sources, count).tolist(),
                                rng.permutation(places)[:count].tolist(), strict=True))
                 for name, sources, places, count in zip(("checkpoint", "relocate", "restore"), (24, 24, 20),
                                                         (20, 24, 24), counts, strict=True)}
        for kv in (fast, plain):
            kv.run_copies(**lists)
        if rng.integers(2):  # else the next copies come before anybody read what was restored
            for layer in range(3):
                assert torch.equal(fast.k(layer), plain.k(layer))
                assert torch.equal(fast.v(layer), plain.v(layer))
    fast.wait_for_restores()
    assert torch.equal(fast.host_data, plain.host_data)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_graphs_launches_and_the_readable_decoder_give_the_same_logits(device, rng, family):
    from bros_ref.config import KVCacheConfig
    from bros_ref.engine.model_runner import ModelRunner, StepWork
    from bros_ref.gpu.attention import KernelAttention
    from bros_ref.gpu.decoder import KernelDecoder
    from bros_ref.gpu.runner import KernelRunner
    from bros_ref.kv_cache.blocks import CopyPlan
    from bros_ref.model.decoder import Decoder
    from bros_ref.model.weights.load import load_model_config
    from bros_ref.model.weights.parameters import random_parameters

    config, pool = load_model_config(f"random:{family}"), KVCacheConfig(64, 16, 0)
    weights = random_parameters(config, 3, HALF, "cuda")
    fast = KernelDecoder(config, weights, HALF, "cuda", KernelAttention(device))

    def launched(body):
        body()
        return body

    runners = [KernelRunner(fast, pool, "cuda", HALF, "cupy"), KernelRunner(fast, pool, "cuda", HALF, "cupy", launched),
               ModelRunner(Decoder(config, weights, HALF, "cuda"), pool, "cuda", HALF)]
    values = torch.from_numpy(rng.standard_normal(tuple(runners[0].kv.data.shape))).half()
    for runner in runners:
        runner.kv.data.copy_(values)
    for count in (1, 3, 4, 4, 7, 3, 8, 1):  # buckets that come again are replayed
        contexts = rng.integers(1, 100, count).tolist()
        order = rng.permutation(64).tolist()
        tables = [[order.pop() for _ in range(-(-length // 16))] for length in contexts]
        work = StepWork(rng.integers(3, 250, count).tolist(), tables, [bool(rng.integers(2)) for _ in contexts],
                        [1] * count, contexts, list(range(count)), list(range(count)), CopyPlan())
        graph, launches, plain = (runner.compute(work).double() for runner in runners)
        assert (graph - launches).norm() < 2e-3 * plain.norm(), "cuBLAS may take another product while capturing"
        assert (graph - plain).norm() < 1e-2 * plain.norm()
        runners[2].kv.data.copy_(runners[0].kv.data)


@pytest.mark.parametrize("model", ["random:llama"])
def test_an_engine_says_the_same_as_on_torch(model):
    from bros_ref.engine.build import LiveSettings, load_model, make_engine, make_runner
    from bros_ref.request import SLO, Request, RequestClass, SamplingParams

    def serve(backend):
        loaded = load_model(model, "cuda", 0, backend)
        settings = LiveSettings(kv_blocks=4, max_num_seqs=4, max_num_batched_tokens=24, chunked_prefill=True)
        runner = make_runner(loaded, settings)
        engine = make_engine("bros", loaded, runner, settings)
        sampling = SamplingParams(max_tokens=6, ignore_eos=True)
        requests = [Request(f"be{i}", RequestClass.BEST_EFFORT, list(range(5, 30 + i)), sampling) for i in range(2)]
        requests += [Request("rt", RequestClass.REAL_TIME, list(range(9, 20)), sampling, slo=SLO(10.0, 10.0))]
        for request in requests:
            engine.add_request(request)
            engine.step()
        while engine.has_unfinished:
            engine.step()
        return [request.output_token_ids for request in requests]

    tokens = serve("cupy")
    assert [len(one) for one in tokens] == [6, 6, 6]
    same = sum(a == b for ours, theirs in zip(tokens, serve("torch"), strict=True)
               for a, b in zip(ours, theirs, strict=True))
    assert same >= 12, "16-bit kernels may turn a close choice, and what follows it, but not most of them"


def test_every_file_was_run():
    """A new .cu file must come into this file too."""
    assert {path.stem.split("_")[0] for path in FOLDER.glob("*.cu")} == {
        "paged", "prefill", "store", "copy", "rope", "add", "silu"}
