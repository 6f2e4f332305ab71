"""Copies by kernels: the same result as the reference's, in an order that a fake stream writes down."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from bros_ref.config import KVCacheConfig
from bros_ref.gpu.copies import KernelKVStorage
from bros_ref.kv_cache.storage import KVStorage
from kernels_cupy.device import Gpu
from kernels_cupy.proof.emulator import Emulator

CPU, LAYERS = torch.device("cpu"), 3


class FakeStreams:
    """Writes down what happens on which stream."""

    def __init__(self, log):
        self.log, self.stream, self.events, self.done = log, "main", 0, set()

    @contextlib.contextmanager
    def side(self):
        self.log.append("side waits for main")
        self.stream = "side"
        yield
        self.stream = "main"

    def record(self):
        assert self.stream == "side"
        number = self.events = self.events + 1
        self.log.append(f"event {number}")
        return Event(self, number)

    def wait(self, event):
        assert self.stream == "main", "an event that the side stream itself waits for orders nothing"
        self.log.append(f"main waits for {event.number}")


class Event:
    def __init__(self, streams, number):
        self.streams, self.number = streams, number

    def query(self):
        return self.number in self.streams.done


class Logged:
    """A device that writes down its launches."""

    gpu = Gpu.of(90)

    def __init__(self, log):
        self.log, self.streams = log, None

    def launch(self, kernel, grid, block, shared_bytes, arguments):
        pairs, planes = grid[0], grid[1]
        self.log.append(f"{self.streams.stream}: {kernel.function} of {pairs} slots, {planes // 2} layers")


@pytest.fixture
def logged():
    log = []
    device = Logged(log)
    device.streams = FakeStreams(log)
    return KernelKVStorage(LAYERS, 2, 8, KVCacheConfig(4, 4, 4), torch.float32, CPU, device, device.streams), log


def test_what_is_overwritten_is_saved_first_and_each_layer_waits_for_itself(logged):
    kv, log = logged
    kv.run_copies(checkpoint=[(0, 0), (1, 1)], relocate=[(2, 3)], restore=[(5, 7)])
    layer = "side: copy_slots of 1 slots, 1 layers"
    assert log == ["side waits for main", "side: copy_slots of 2 slots, 3 layers",
                   "side: copy_slots of 1 slots, 3 layers", "event 1", layer, "event 2", layer, "event 3", layer,
                   "event 4", "event 5", "main waits for 1"]
    log.clear()
    kv.k(1)
    kv.v(1)
    assert log == ["main waits for 3"], "once"
    kv.write(0, *torch.zeros(2, 1, 2, 8), torch.tensor([0]))
    assert log[-1] == "main waits for 2"
    kv.wait_for_restores()
    assert log[-1] == "main waits for 4"
    assert len(log) == 3


def test_a_later_copy_comes_after_a_restore_that_nobody_read(logged):
    kv, log = logged
    kv.run_copies(restore=[(0, 1)])
    log.clear()
    kv.run_copies(checkpoint=[(1, 2)])
    assert log[:4] == [f"main waits for {n}" for n in (2, 3, 4)] + ["side waits for main"]


def test_integers_live_until_their_kernels_have_run(logged):
    kv, _ = logged
    for _ in range(3):
        kv.run_copies(checkpoint=[(1, 2)])
    assert len(kv._pairs) == 3
    kv._streams.done |= set(range(kv._streams.events + 1))
    kv.run_copies(checkpoint=[(1, 2)])
    assert len(kv._pairs) == 1


@needs_emulator
def test_the_same_result_as_the_reference(rng):
    config = KVCacheConfig(6, 4, 5)
    fast = KernelKVStorage(LAYERS, 2, 8, config, torch.float32, CPU, Emulator())
    plain = KVStorage(LAYERS, 2, 8, config, torch.float32, CPU)
    values = torch.from_numpy(rng.standard_normal(tuple(plain.data.shape))).float()
    for kv in (fast, plain):
        kv.data.copy_(values)
    for _ in range(12):
        def drawn(sources, destinations):
            count = int(rng.integers(0, 5))
            return list(zip(rng.integers(0, sources, count).tolist(),
                            rng.permutation(destinations)[:count].tolist(), strict=True))

        lists = {"checkpoint": drawn(24, 20), "relocate": drawn(24, 24), "restore": drawn(20, 24)}
        for kv in (fast, plain):
            kv.run_copies(**lists)
        assert torch.equal(fast.data, plain.data)
        assert torch.equal(fast.host_data, plain.host_data)


@needs_emulator
@pytest.mark.parametrize("relocate", [[(0, 1), (1, 0)], [(0, 1), (1, 2), (2, 3)], [(5, 5)], [(3, 9)]])
def test_relocation_reads_everything_before_it_writes(relocate):
    kv = KernelKVStorage(1, 1, 8, KVCacheConfig(3, 4, 0), torch.float32, CPU, Emulator())
    kv.data.copy_(torch.arange(12.0).view(1, 1, 3, 4, 1, 1).expand_as(kv.data))
    kv.run_copies(relocate=relocate)
    wanted = np.arange(12.0)
    wanted[[to for _, to in relocate]] = [of for of, _ in relocate]
    assert kv.data[0, 0, :, :, 0, 0].flatten().tolist() == wanted.tolist()


def test_the_errors_are_the_reference_s(logged):
    kv, log = logged
    for lists, said in (({"checkpoint": [(0, 16)]}, "checkpoint copy 0 -> 16"), ({"restore": [(16, 0)]}, "restore"),
                        ({"relocate": [(0, 2), (1, 2)]}, "twice")):
        with pytest.raises(ValueError, match=said):
            kv.run_copies(**lists)
    assert log == [], "nothing was copied"
