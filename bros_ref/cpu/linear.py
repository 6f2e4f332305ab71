"""Products of a few rows with large weights, each computed by the torch operator that is fastest on this CPU.

The reference is `model/linear.py`: x @ w.T + b by F.linear. Decoding multiplies 1 to 64 rows by every weight, so with
the right operator it takes about the time of reading the weights. Which operator is best differs between CPUs: with one
row, two batched halves read twice as fast as F.linear on one machine and half as fast on another. So `FastestLinear`
times the candidates once, for each shape of weight and each range of rows, and remembers the winners per CPU. It knows
nothing of layers or models. All candidates give the same result to rounding.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bros_ref.environment import cpu_model
from bros_ref.files import keep_cached, read_cached

ROWS = (1, 2, 4, 8, 16, 32, 64, 512)  # n rows are computed as timed for the first of these that is at least n
SMALLEST_WEIGHT = 1 << 18  # elements; below it the call costs more than the product
COLD_BYTES = 64 << 20  # candidates rotate through this much of weights, more than caches hold, as a forward pass does
LARGEST_TRIAL = 1 << 31  # multiplications; larger products take the choice of fewer rows
ROUNDS = 8
LEAD = 0.95  # a way must take at most this share of the time of the plainer ways before it
PACKED_LEAD = 0.85  # the same for "packed", which holds a second copy of the weight, unless fewer rows use it already
PACKED_SHARE = 0.25  # of the available memory that those copies may take
ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def columns(x: Tensor, w: Tensor) -> Tensor:
    """w @ x.T: some BLAS libraries read the weights faster when they are the left operand."""
    return (w @ x.t()).t().contiguous()


def twice(x: Tensor, w: Tensor) -> Tensor:
    """One row as two equal rows: a matrix product may run at the memory's speed where a vector product does not."""
    return (w @ x.expand(2, -1).t())[:, 0][None]


def split(x: Tensor, w: Tensor, parts: int) -> Tensor:
    """A batch of equal parts of w: a batch is split over threads; a product of few rows would run on one."""
    rows, inputs = w.shape
    product = torch.bmm(w.view(parts, rows // parts, inputs), x.t().expand(parts, inputs, x.shape[0]))
    return product.view(rows, x.shape[0]).t().contiguous()


def onednn(x: Tensor, w: Tensor) -> Tensor:
    """oneDNN's product: the operator that torch's own compiler emits for CPUs. `w` is as stored, or packed."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return out


def pack(w: Tensor) -> Tensor:
    """A copy of w in the order that oneDNN prefers."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(w, None)
    return packed


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # plainest first
    "plain": F.linear, "columns": columns, "twice": twice, "halves": partial(split, parts=2),
    "eighths": partial(split, parts=8), "onednn": onednn, "packed": onednn}


def possible_ways(w: Tensor, rows: int) -> list[str]:
    """The names of the ways that can compute a product of `rows` rows with w."""
    unfit = {"twice": rows > 1, "halves": w.shape[0] % 2 > 0, "eighths": w.shape[0] % 8 > 0, "onednn": not ONEDNN,
             "packed": not ONEDNN}
    return [way for way in WAYS if not unfit.get(way, False)]


class FastestLinear:
    """`linear` for given weights, fp32 on a CPU, each product by the way that was fastest.

    Args:
        weights: [out, in] each; those of fewer than SMALLEST_WEIGHT elements, of other dtypes or on other devices are
            left to `linear`.
        choose: shape's weights and a number of rows -> the name of a way; by default, the winner of a trial, kept in
            the cache folder.
    """

    def __init__(self, weights: Iterable[Tensor], choose: Callable[[Sequence[Tensor], int], str] | None = None) -> None:
        self._packed: dict[int, Tensor] = {}
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for w in weights:
            if w.ndim == 2 and w.numel() >= SMALLEST_WEIGHT and w.dtype is torch.float32 and w.device.type == "cpu":
                by_shape.setdefault(w.shape, []).append(w)
        trials = None if choose else Trials(sum(w.nbytes for group in by_shape.values() for w in group))
        self.ways = {shape: [(choose or trials.fastest)(group, rows) for rows in ROWS]  # type: ignore[union-attr]
                     for shape, group in by_shape.items()}
        for shape, group in by_shape.items():
            if "packed" in self.ways[shape]:
                self._packed |= {w.data_ptr(): pack(w) for w in group}
        if trials is not None:
            trials.keep()

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """See `linear`."""
        ways = self.ways.get(w.shape)
        if ways is None or not x.shape[0]:
            return F.linear(x, w, b)
        rows = x.shape[0]
        way = ways[next((place for place, most in enumerate(ROWS) if rows <= most), -1)]
        if way == "plain":
            return F.linear(x, w, b)
        out = WAYS[way](x, self._packed[w.data_ptr()] if way == "packed" else w)
        return out if b is None else out.add_(b)


class Trials:
    """Times the candidates, or recalls what it timed before on the same CPU with as many threads.

    Args:
        weight_bytes: of all weights together; if a second copy of them would take more than PACKED_SHARE of the
            available memory, "packed" is no candidate.
    """

    def __init__(self, weight_bytes: int) -> None:
        may_pack = weight_bytes <= PACKED_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._excluded = set() if may_pack else {"packed"}
        kind = "packed" if may_pack else "stored"
        self._name = f"linear{len(WAYS)}-pieces-{torch.__version__}-{torch.get_num_threads()}-{kind}.json"
        try:
            stored = json.loads(read_cached(self._name) or "{}")
        except ValueError:
            stored = {}
        self._cpu = cpu_model() or "unknown"
        self._known: dict[str, str] = stored.get(self._cpu, {}) if isinstance(stored, dict) else {}
        self._is_new = False

    def fastest(self, weights: Sequence[Tensor], rows: int) -> str:
        """The way to compute `rows` rows with weights of one shape."""
        outputs, inputs = weights[0].shape
        while rows > 1 and rows * outputs * inputs > LARGEST_TRIAL:
            rows = ROWS[ROWS.index(rows) - 1]
        key = f"{outputs}x{inputs}x{rows}"
        if self._known.get(key) not in possible_ways(weights[0], rows):
            self._known[key], self._is_new = self._race(weights, rows), True
        return self._known[key]

    def _race(self, weights: Sequence[Tensor], rows: int) -> str:
        """The fastest way; a less simple one must win by a clear margin. Rounds alternate and the best round counts,
        since other work on the machine can only make a round slower."""
        cold = list(weights[:max(1, COLD_BYTES // weights[0].nbytes)]) if rows <= ROWS[-3] else list(weights[:1])
        ways = [way for way in possible_ways(cold[0], rows) if way not in self._excluded]
        operands = {way: [pack(w) for w in cold] if way == "packed" else cold for way in ways}
        x = torch.randn(rows, cold[0].shape[1], generator=torch.Generator().manual_seed(0))
        best_s = dict.fromkeys(ways, float("inf"))
        with torch.inference_mode():
            for _ in range(ROUNDS):
                for way in ways:
                    start_s = time.perf_counter()
                    for w in operands[way]:
                        WAYS[way](x, w)
                    best_s[way] = min(best_s[way], time.perf_counter() - start_s)
        prefix = "x".join(map(str, cold[0].shape)) + "x"
        is_held = any(known == "packed" for key, known in self._known.items() if key.startswith(prefix))
        winner = ways[0]
        for way in ways[1:]:
            if best_s[way] < (PACKED_LEAD if way == "packed" and not is_held else LEAD) * best_s[winner]:
                winner = way
        return winner

    def keep(self) -> None:
        """Writes what was timed to the cache folder, if anything was."""
        if self._is_new:
            keep_cached(self._name, json.dumps({self._cpu: self._known}))
