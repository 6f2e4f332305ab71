"""CUDA graphs: the first decode step of a bucket is launched kernel by kernel, and every later one as a single graph.

A graph stores addresses and scalar arguments, not tensor values, so the buffers of its bucket are written before each
replay. A bucket's computation must not allocate, upload or wait, and must make the same calls on the same memory in
every step. `tests/gpu/test_counts.py` checks this without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

Body = Callable[[], object]
Capture = Callable[[Body], Body]


class Graphs:
    """One graph per key.

    Args:
        capture: runs a body once and returns a function that runs it again.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Body] = {}

    def run(self, key: Hashable, body: Body) -> None:
        """Runs the body, or the graph captured from the first body with this key."""
        replay = self._replays.get(key)
        if replay is None:
            self._replays[key] = self._capture(body)
        else:
            replay()


class CudaCapture:
    """Captures on one GPU. All graphs share one memory pool, because they run one after another.

    Not measured here: no GPU was available when this was written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        """Runs the body on a side stream, which computes the step and loads its kernels, and then captures the body."""
        side, main = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            body()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        return graph.replay
