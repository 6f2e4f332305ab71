"""On a GPU: every kernel, dtype and direction against float64, large shared memory, graph capture, copies, an engine.

It needs no C++ compiler, and is skipped, and counted, where no GPU or no CuPy is.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels_cupy.device import FOLDER
from kernels_cupy.gpu import CupyDevice, why_unavailable
from kernels_cupy.heads import Heads
from kernels_cupy.launch import STEPS, Problem, copy_slots, paged_attention, store_kv, why_not
from kernels_cupy.proof.contract import Batch, decode, prefill

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
    assert {path.stem.split("_")[0] for path in FOLDER.glob("*.cu")} == {"paged", "prefill", "store", "copy"}
