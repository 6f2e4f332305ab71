"""Memory, held to the promise: a decode step leaves nothing behind but its tokens, and weights are held once.

Without a trace: recording every step is what a trace is for, and grows with the run."""

import gc
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.engine import LLMEngine
from bros_ref.engine.build import LiveSettings, load_model, make_runner
from bros_ref.request import SLO, Request, RequestClass, SamplingParams
from bros_ref.scheduler import make_scheduler
from bros_ref.scheduler.latency_model import StepLatencyModel

NUM_REQUESTS, NUM_STEPS = 8, 400
BYTES_PER_TOKEN = 16  # the token itself: a place in a list that grows by an eighth more than it needs
SLACK_BYTES = 16_000  # block tables grow, and Python keeps some freed objects for later


def tensor_bytes():
    """Bytes of all tensors that are alive, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor)}
    return sum(storages.values())


def decoding_engine(policy):
    """An engine without a trace in the middle of decoding NUM_REQUESTS, half of each class, in an ample pool."""
    loaded = load_model("random:llama", "cpu")
    runner = make_runner(loaded, LiveSettings(kv_blocks=NUM_REQUESTS * 64))
    config = SchedulerConfig(max_num_seqs=NUM_REQUESTS, max_context_tokens=loaded.config.max_context_tokens)
    latency = StepLatencyModel((0.001, 1e-5, 1e-8, 1e-8))
    engine = LLMEngine(make_scheduler(policy, config, KVCacheConfig(NUM_REQUESTS * 64), latency), runner)
    for i in range(NUM_REQUESTS):
        is_rt = i % 2 == 0
        engine.add_request(Request(f"r{i}", RequestClass.REAL_TIME if is_rt else RequestClass.BEST_EFFORT, [7] * 20,
                                   SamplingParams(max_tokens=900, ignore_eos=True),
                                   slo=SLO(1e6, 1e6) if is_rt else None))
    return engine


@pytest.mark.parametrize("policy", ["bros", "vllm-priority", "tgi"])
def test_decoding_leaves_nothing_behind_but_its_tokens(policy):
    engine = decoding_engine(policy)
    tracemalloc.start()
    for _ in range(450):  # the latency model keeps its last 256 steps: all of them must be traced
        engine.step()
    gc.collect()
    tensors_before = tensor_bytes()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(NUM_STEPS):
        engine.step()
        assert len(engine.scheduler.output.requests) == NUM_REQUESTS, "not a full decode"
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensor_bytes() == tensors_before
    assert after - before <= NUM_STEPS * NUM_REQUESTS * BYTES_PER_TOKEN + SLACK_BYTES


WEIGHTS = """
import sys, torch
from dataclasses import replace
from bros_ref.config import KVCacheConfig
from bros_ref.engine import LLMEngine
from bros_ref.model.decoder import Decoder
from bros_ref.model.weights.parameters import RANDOM_FAMILIES, random_parameters
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.request import Request, RequestClass, SamplingParams
from bros_ref.config import SchedulerConfig
from bros_ref.scheduler import make_scheduler

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def run(config):
    weights = random_parameters(config)
    kv = KVCacheConfig(64)
    engine = LLMEngine(make_scheduler("bros", SchedulerConfig(), kv), ModelRunner(Decoder(config, weights), kv))
    for i in range(6):  # one row, few rows, many rows: every way a product is computed
        engine.add_request(Request(f"r{i}", RequestClass.BEST_EFFORT, [1] * (1 + 20 * (i % 2)),
                                   SamplingParams(max_tokens=2 + 2 * i)))
    while engine.has_unfinished:
        engine.step()
    return sum(tensor.nbytes for tensor in weights.values()), engine

torch.set_num_threads(1)
toy = RANDOM_FAMILIES[sys.argv[1]]
_, warm = run(toy)  # libraries and thread pools are there
before = resident_bytes()
wide = replace(toy, hidden_size=1536, intermediate_size=4096)
weights, engine = run(wide)
print((resident_bytes() - before) / weights, weights)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weights_are_held_once(family):
    done = subprocess.run([sys.executable, "-c", WEIGHTS, family], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    share, weights = map(float, done.stdout.split())
    assert weights > 100e6
    assert 0.9 < share < 1.3, f"resident memory grew by {share:.2f} x the weights"
