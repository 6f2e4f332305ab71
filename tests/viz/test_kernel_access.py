"""Warp requests, their sectors and bank turns, by hand-made accesses and by the emulator's own counters."""

from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from bros_ref.viz.widgets.frames import Frame, Frames
from bros_ref.viz.widgets.kernel_access import kernel_access, request_svg, warp_requests
from kernels_cupy.proof.contract import Batch, Heads, decode
from kernels_cupy.proof.emulator import Emulator


@dataclass(frozen=True)
class Touch:
    lane: int
    offset: int
    size: int = 4
    step: int = 1
    argument: int = 1
    kind: str = "load"
    block: int = 0
    warp: int = 0
    line: str = "x.cu:1"


def request(offsets, size=4, argument=1):
    [only] = warp_requests([Touch(lane, offset, size, argument=argument) for lane, offset in enumerate(offsets)])
    return only


@pytest.mark.parametrize(("offsets", "size", "sectors", "minimum"), [
    (range(0, 128, 4), 4, 4, 4), (range(0, 32 * 64, 64), 2, 32, 2), ([0] * 32, 4, 1, 1), ([30], 4, 2, 1),
    (range(16, 16 + 512, 16), 16, 17, 16)])
def test_sectors(offsets, size, sectors, minimum):
    assert (len(request(offsets, size).sectors), request(offsets, size).min_sectors) == (sectors, minimum)


@pytest.mark.parametrize(("offsets", "size", "turns"), [
    (range(0, 128, 4), 4, 1), (range(0, 32 * 128, 128), 4, 32), ([0] * 32, 4, 1), (range(0, 256, 8), 4, 2),
    (range(0, 512, 16), 16, 1), (range(0, 32 * 128, 128), 16, 8)])
def test_bank_turns(offsets, size, turns):
    assert request(offsets, size, argument=-1).bank_turns == turns


@pytest.mark.parametrize("argument", [1, -1])
def test_the_picture_is_an_svg_that_says_what_it_shows(argument):
    tree = ElementTree.fromstring(request_svg(request(range(0, 32 * 64, 64), 4, argument), {1: "k_cache"}))
    title = tree.findtext("{http://www.w3.org/2000/svg}title")
    assert ("32 sectors for 128 bytes, 4 would do" in title) == (argument == 1)
    assert ("16 turns" in title) == (argument == -1)


def test_frames_hold_every_picture_and_refuse_none():
    frames = Frames([Frame("<svg/>", 'a "first" </script> one'), Frame("<svg/>", "b")], "label")
    assert frames.to_html().count("data-frame=") == 2
    assert "&quot;first&quot; &lt;/script&gt;" in frames.to_html()
    assert frames.to_html().count("</script>") == 2
    assert frames._repr_mimebundle_()["text/plain"] == "label: 2 pictures"
    with pytest.raises(ValueError, match="at least one"):
        Frames([], "nothing")


@needs_emulator
@pytest.mark.parametrize("step", [1, 3, 4])
def test_what_is_drawn_is_what_the_emulator_counts(step):
    batch = Batch.draw(np.random.default_rng(1), Heads(4, 2, 64, 16, torch.float16), [1], [33], [True])
    device = Emulator(record=1_000_000, counters=True)
    decode(device, batch, step, 1)
    kinds = {(access.block, access.warp) for access in device.accesses}
    requests = [one for block, warp in kinds for one in warp_requests(device.accesses, block, warp)]
    in_global = [one for one in requests if one.argument >= 0]
    assert sum(len(one.sectors) for one in in_global) == device.counters.sectors
    shared = [one.bank_turns for one in requests if one.argument < 0]
    assert max(shared, default=0) == device.counters.worst_conflict
    assert len(kernel_access(device.accesses, {}, arguments=(1,), limit=5).frames) <= 5
