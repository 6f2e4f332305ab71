"""CUDA graphs: a decode step of a bucket is launched once kernel by kernel, and from then on as one graph.

A graph holds addresses and numbers, not values: the buffers of its bucket are written before each replay. What a
bucket's computation may do is checked without a GPU (`tests/gpu/test_counts.py`): no allocation, no upload, no wait,
and the same calls on the same memory in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

Body = Callable[[], object]
Capture = Callable[[Body], Body]


class Graphs:
    """One graph per key.

    Args:
        capture: runs a body once and returns what runs it again.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Body] = {}

    def run(self, key: Hashable, body: Body) -> None:
        """Runs the body, or the graph that the first body of this key became."""
        replay = self._replays.get(key)
        if replay is None:
            self._replays[key] = self._capture(body)
        else:
            replay()


class CudaCapture:
    """Captures on one GPU; all graphs share one memory pool, for they run one after another.

    Not measured here: no GPU was available when this was written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        """Runs the body on a side stream, which computes the step and loads its kernels, and then captures it."""
        side, main = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            body()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        return graph.replay
