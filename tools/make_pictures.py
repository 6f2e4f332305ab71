"""The README's picture: the KV pool in the busiest step of a simulated run, written to docs/kv_blocks.svg.

    python tools/make_pictures.py

The run is seeded and its clock virtual, so the picture is the same on every machine; a test compares it.
"""

from __future__ import annotations

import random
from pathlib import Path

from bros_ref.request import SLO, RequestClass
from bros_ref.simulator.simulate import SimulationSettings, run
from bros_ref.trace import Trace
from bros_ref.viz.figures.kv_blocks import block_map, busiest_step
from bros_ref.workload import WorkloadItem

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "kv_blocks.svg"


def busy_run() -> Trace:
    """Llama-2-7B under BROS in 48 blocks of 16 slots: 8 documents, then a question every 30 ms."""
    draw = random.Random(3)
    documents = [WorkloadItem(0.0, RequestClass.BEST_EFFORT, draw.randrange(70, 130), draw.randrange(40, 80))
                 for _ in range(8)]
    questions = [WorkloadItem(0.1 + 0.03 * i, RequestClass.REAL_TIME, draw.randrange(12, 44), draw.randrange(8, 24),
                              SLO(ttft_s=0.4, tpot_s=0.2)) for i in range(24)]
    settings = SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=48 * 16, max_num_seqs=16)
    return run("bros", settings, (*documents, *questions), keep_steps=True)[1]


def kv_blocks() -> str:
    """The picture, on white: a README may be read on black."""
    trace = busy_run()
    return block_map(trace, busiest_step(trace)).replace('style="', 'style="background:#fff;', 1) + "\n"


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(kv_blocks(), encoding="utf-8")
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")
