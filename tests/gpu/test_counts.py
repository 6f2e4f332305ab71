"""What a step asks of a GPU, counted without one: launches, uploads, waits, allocations, and which memory is used.

`meta` tensors stand for the GPU's. The same counts are printed by `bros-ref bench gpu-step`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bros_ref.config import KVCacheConfig
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.engine.profile import _batch_output
from bros_ref.evaluation.bench import gpu_step
from bros_ref.evaluation.bench.gpu_step import counted_step, meta_runner
from bros_ref.gpu.runner import KernelRunner
from bros_ref.model.weights.load import load_model_config
from kernels_cupy.proof.recording import Recorder

HALF = torch.float16
LAYERS = 3
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def config(family="llama", layers=LAYERS):
    """A small model with heads that the tensor-core kernels take."""
    small = load_model_config(f"random:{family}")
    return dataclasses.replace(small, num_layers=layers, head_dim=64, num_heads=4, num_kv_heads=2, rotary_dim=None,
                               layer_windows=())


def decode(runner, recorder, contexts):
    """Counts a decode step of sequences with so many tokens in the cache already."""
    return counted_step(runner, recorder, [(1, context) for context in contexts])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_decode_step_has_ten_kernels_a_layer_one_upload_and_one_wait(family, batch):
    counts = []
    for layers in (1, LAYERS):
        recorder = Recorder()
        runner = meta_runner(config(family, layers), HALF, recorder)
        decode(runner, recorder, [40] * batch)
        assert len(recorder.uploads) == 1
        assert len(recorder.waits) == len(recorder.downloads) == 1
        counts.append(len(recorder.kernels))
    per_layer = (counts[1] - counts[0]) / (LAYERS - 1)
    assert per_layer <= 10
    assert counts[0] - per_layer <= 10, "embedding, first norm, head and sampling"


def test_the_readable_decoder_needs_more_of_everything():
    fast, plain = Recorder(), Recorder()
    decode(meta_runner(config(), HALF, fast), fast, [40] * 4)
    decode(meta_runner(config(), HALF, plain, fused=False), plain, [40] * 4)
    assert len(plain.kernels) > 1.5 * len(fast.kernels)
    assert len(plain.uploads) > len(fast.uploads)
    assert len(plain.waits) > len(fast.waits)
    assert len(plain.allocations) > len(fast.allocations)


@pytest.mark.parametrize("heads", [64, 80], ids=["step 5", "other head size"])
def test_steps_of_a_bucket_make_the_same_calls_on_the_same_memory(heads):
    """So a CUDA graph of the first step computes all of them."""
    recorder = Recorder()
    runner = meta_runner(dataclasses.replace(config(), head_dim=heads), HALF, recorder)
    forward = runner.model.forward_step
    inside = []

    def watched(*args):
        recorder.clear()
        logits = forward(*args)
        assert [*recorder.allocations, *recorder.uploads, *recorder.downloads, *recorder.waits] == []
        inside.append(list(recorder.calls))
        return logits

    runner.model.forward_step = watched
    steps = {}
    for contexts in ((40, 40, 40), (1, 2, 3, 4), (255, 20, 7), (256, 1, 1), (40,) * 5):
        inside.clear()
        decode(runner, recorder, contexts)
        assert inside[0] == inside[1], "the same step twice"
        steps[contexts] = inside[0]
    one = steps[40, 40, 40]
    assert one == steps[1, 2, 3, 4] == steps[255, 20, 7], "3 and 4 sequences, up to 256 tokens with the new one"
    assert steps[256, 1, 1] != one, "wider tables are another bucket"
    assert steps[(40,) * 5] != one, "more rows are another bucket"
    assert len({len(calls) for calls in steps.values()}) == 1


def test_a_mixed_batch_has_one_launch_for_decodes_and_one_for_prefills():
    recorder = Recorder()
    runner = meta_runner(config(), HALF, recorder)
    counted_step(runner, recorder, [(7, 0), (1, 40), (5, 9), (1, 3)])
    names = recorder.kernels
    assert names.count("paged_attention") == names.count("prefill_attention") == LAYERS
    assert len(recorder.uploads) == len(recorder.waits) == 1


def test_a_step_that_samples_nothing_reads_nothing_back():
    recorder = Recorder()
    runner = meta_runner(config(), HALF, recorder)
    output = _batch_output([(5, 0)], runner.kv.config)
    output.num_scheduled_tokens[0] = 3
    with recorder:
        recorder.clear()
        assert runner.execute(output) == [None]
    assert (len(recorder.uploads), recorder.waits) == (1, [])


def test_sampled_and_greedy_requests_together_take_one_wait():
    recorder = Recorder()
    runner = meta_runner(config(), HALF, recorder)
    output = _batch_output([(1, 20)] * 3, runner.kv.config)
    for request, temperature, top_p in zip(output.requests, (0.0, 0.7, 1.0), (1.0, 0.9, 1.0), strict=True):
        request.seed = 4
        request.sampling = dataclasses.replace(request.sampling, temperature=temperature, top_p=top_p)
    with recorder:
        recorder.clear()
        runner.execute(output)
    assert (len(recorder.uploads), len(recorder.waits)) == (1, 1)


def test_models_of_other_kinds_keep_the_readable_decoder():
    opt = load_model_config("random:opt")
    recorder = Recorder()
    runner = meta_runner(opt, HALF, recorder)
    assert type(runner) is ModelRunner
    assert type(meta_runner(config(), HALF, recorder)) is KernelRunner
    with recorder:
        runner.execute(_batch_output([(1, 20), (3, 0)], runner.kv.config))
    assert {"paged_attention", "prefill_attention"} <= set(recorder.kernels), "its attention is by kernels all the same"


def test_the_recorder_sees_what_it_must():
    recorder = Recorder()
    with torch.inference_mode(), recorder:
        x = torch.empty(4, 8, device="meta")
        assert (recorder.kernels, recorder.allocations) == ([], ["empty"])
        x.view(8, 4)[2:].t()
        assert recorder.kernels == []
        y = torch.ones(4, 8).to("meta")
        x.copy_(torch.zeros(4, 8), non_blocking=True)
        assert (recorder.uploads, recorder.kernels) == ([128, 128], [])
        x.add_(y)
        assert recorder.kernels == ["add_"]
        before = list(recorder.allocations)
        torch.mm(x, x.t(), out=torch.empty(4, 4, device="meta"))
        assert recorder.allocations == [*before, "empty"]
        x.argmax(dim=-1).tolist()
        assert (len(recorder.waits), recorder.downloads) == (1, [32])
        x[0, 0].item()
        x.cpu()
        assert len(recorder.waits) == 3
        torch.ones(3).add_(1).tolist()
        assert len(recorder.waits) == 3, "what happens on the host is no business of the GPU"
    with pytest.raises(RuntimeError, match="cannot hold allocations"):
        recorder.replay()


def test_the_estimate_is_the_sum_of_what_was_counted(monkeypatch):
    def total_ms(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(gpu_step, name, value)
        rows = gpu_step.estimate_steps(gpus=["h100-80gb"], batches=[1])
        monkeypatch.undo()
        return {row.path: row for row in rows}

    rows = total_ms()
    plain, fused, graph = (rows[path] for path in gpu_step.PATHS)
    assert plain.kernels > 600 > 330 > fused.kernels == graph.kernels
    assert (fused.uploads, fused.waits) == (1, 1)
    assert (plain.uploads, plain.waits) == (8, 2)
    for row in rows.values():
        assert row.estimated_ms > max(row.device_ms, row.roofline_ms)
    slower = total_ms(LAUNCH_S=gpu_step.LAUNCH_S + 1e-4)
    assert slower[plain.path].host_ms - plain.host_ms == pytest.approx(0.1 * plain.kernels)
    assert slower[graph.path] == graph, "a graph is one launch"
    gaps = total_ms(GAP_S=gpu_step.GAP_S + 1e-4)
    assert gaps[graph.path].estimated_ms - graph.estimated_ms == pytest.approx(0.1 * graph.kernels)
    crossings = total_ms(CROSSING_S=gpu_step.CROSSING_S + 1e-3)
    assert crossings[plain.path].estimated_ms - plain.estimated_ms == pytest.approx(plain.uploads + plain.waits)


def test_a_pool_for_the_counts_takes_no_memory():
    runner = meta_runner(config(), HALF, Recorder(), KVCacheConfig(1 << 20, 16, 0))
    assert runner.kv.data.device.type == "meta"
