"""What arrives, when, and how long it is: seeded arrival processes, lengths, and the source for a serving loop.

It knows no tokens, no engine and no clock: the loop passes the time. Invariants: items come out in order of
arrival, ties in the order they were put in; the same seed gives the same workload; an impossible rate or length is
refused here, before a run starts. Files are read and written by `files.py`.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, KeysView
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from bros_ref.request import SLO, RequestClass

# How many lengths are wanted -> that many lengths in tokens, int64 [count].
LengthSampler = Callable[[np.random.Generator, int], npt.NDArray[np.int64]]


MAX_TOKENS = 10**7  # more than any model reads: a length beyond it is a slip, and its prompt would fill the memory
MAX_PROMPT_CHARACTERS = 2**23  # as far as a file's line is read


class WorkloadError(ValueError):
    """A workload that cannot be served. The message says what was wrong, what was expected, and where."""


@dataclass(frozen=True, slots=True)
class WorkloadItem:
    """One request to come.

    Attributes:
        arrival_s: seconds after the start of the run.
        prompt_tokens, output_tokens: 1 to MAX_TOKENS each; the output length is when it stops, not a limit.
        slo: needed by a real-time item, not allowed for a best-effort one.
        prompt: text to be tokenised, of at most MAX_PROMPT_CHARACTERS; None means that only the length matters.
        request_id: given by `Workload` when the item comes due; no part of what the item is.

    Raises:
        WorkloadError: a field is out of its range.
    """

    arrival_s: float
    request_class: RequestClass
    prompt_tokens: int
    output_tokens: int
    slo: SLO | None = None
    prompt: str | None = None
    request_id: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival_s) and self.arrival_s >= 0):
            raise WorkloadError(f"arrival_s: expected a finite number of seconds, at least 0, got {self.arrival_s!r}")
        for name in ("prompt_tokens", "output_tokens"):
            if not 1 <= getattr(self, name) <= MAX_TOKENS:
                raise WorkloadError(f"{name}: expected 1 to {MAX_TOKENS} tokens, got {getattr(self, name)}")
        if (self.request_class is RequestClass.REAL_TIME) != (self.slo is not None):
            raise WorkloadError("slo: a real-time request needs one, and a best-effort one must have none")
        if self.prompt == "":
            raise WorkloadError("prompt: expected text, or None where only the length matters; got an empty string")
        if self.prompt is not None:
            _check_text(self.prompt)


# -- arrivals and lengths -------------------------------------------------------------------------------------------


def poisson_arrivals(rate_per_s: float, duration_s: float, rng: np.random.Generator) -> list[float]:
    """Arrival times in [0, duration_s), ascending, of independent users: exponential gaps of mean 1 / rate_per_s.

    Raises:
        WorkloadError: the rate or the duration is not a positive finite number.
    """
    return gamma_arrivals(rate_per_s, 1.0, duration_s, rng)


def gamma_arrivals(rate_per_s: float, cv: float, duration_s: float, rng: np.random.Generator) -> list[float]:
    """As `poisson_arrivals`, with gamma gaps of coefficient of variation `cv`: 1 is Poisson, above 1 is bursty.

    Raises:
        WorkloadError: the rate, the duration or `cv` is not a positive finite number.
    """
    for name, value in (("rate_per_s", rate_per_s), ("duration_s", duration_s), ("cv", cv)):
        _check_positive(name, value)
    shape, scale = 1.0 / cv**2, cv**2 / rate_per_s  # mean = shape * scale, variance = shape * scale^2
    times: list[float] = []
    now_s = 0.0
    while True:
        batch = now_s + np.cumsum(rng.gamma(shape, scale, size=256))
        times += batch[batch < duration_s].tolist()
        now_s = float(batch[-1])
        if now_s >= duration_s:
            return times


def uniform_lengths(low: int, high: int) -> LengthSampler:
    """Whole numbers of tokens in [low, high], both ends included.

    Raises:
        WorkloadError: not 1 <= low <= high.
    """
    _check_range(low, high)
    return lambda rng, count: rng.integers(low, high, size=count, endpoint=True)


def lognormal_lengths(median: float, sigma: float, low: int, high: int) -> LengthSampler:
    """Log-normal lengths, rounded and clipped to [low, high]; `sigma` is the deviation of the logarithm.

    Raises:
        WorkloadError: not 1 <= low <= high, or the median or sigma is not a positive finite number.
    """
    _check_range(low, high)
    _check_positive("median", median)
    _check_positive("sigma", sigma)
    return lambda rng, count: np.clip(np.rint(rng.lognormal(math.log(median), sigma, size=count)),
                                      low, high).astype(np.int64)


def mixed_lengths(most: LengthSampler, some: LengthSampler, share: float) -> LengthSampler:
    """Lengths drawn from `some` with probability `share`, and otherwise from `most`, independently of each other.

    Raises:
        WorkloadError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise WorkloadError(f"share: expected a number from 0 to 1, got {share!r}")
    return lambda rng, count: np.where(rng.random(count) < share, some(rng, count), most(rng, count))


def open_loop(arrivals_s: Iterable[float], request_class: RequestClass, prompt_tokens: LengthSampler,
              output_tokens: LengthSampler, rng: np.random.Generator, slo: SLO | None = None) -> list[WorkloadItem]:
    """One item for each arrival time, with sampled lengths: users who do not wait for one another."""
    times = [float(time_s) for time_s in arrivals_s]
    lengths = zip(prompt_tokens(rng, len(times)).tolist(), output_tokens(rng, len(times)).tolist(), strict=True)
    return [WorkloadItem(time_s, request_class, prompt, output, slo)
            for time_s, (prompt, output) in zip(times, lengths, strict=True)]


def merge(*sources: Iterable[WorkloadItem]) -> list[WorkloadItem]:
    """All items in order of arrival; ties in the order of the sources, then of the items."""
    return sorted(chain(*sources), key=lambda item: item.arrival_s)


@dataclass
class ClosedLoopBatches:
    """Best-effort work as a batch job submits it: `batch_size` requests; when the last has ended, the next batch.

    The backlog never grows beyond one batch and never runs dry, so its throughput measures the server and not the
    length of the run. The first batch arrives at `start_s`. There is no batch after `num_batches` of them (None:
    no such limit), and none is started at or after `stop_s`.

    Raises:
        WorkloadError: the batch size or the number of batches is not positive, or a time is negative or NaN.
    """

    batch_size: int
    prompt_tokens: LengthSampler
    output_tokens: LengthSampler
    rng: np.random.Generator
    start_s: float = 0.0
    stop_s: float = math.inf
    num_batches: int | None = None
    num_started: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_batches is not None and self.num_batches < 1):
            raise WorkloadError(f"a closed loop needs at least one request and one batch, got batches of "
                                f"{self.batch_size}, {self.num_batches} of them")
        if not (math.isfinite(self.start_s) and 0 <= self.start_s < self.stop_s):
            raise WorkloadError(f"a closed loop needs 0 <= start_s < stop_s, got {self.start_s} and {self.stop_s}")

    def next_batch(self, now_s: float) -> list[WorkloadItem]:
        """The batch that arrives at `now_s`, the end of the one before; empty when there are no more."""
        if now_s >= self.stop_s or self.num_started == self.num_batches:
            return []
        self.num_started += 1
        return open_loop([now_s] * self.batch_size, RequestClass.BEST_EFFORT, self.prompt_tokens, self.output_tokens,
                         self.rng)


# -- the source that a serving loop asks ----------------------------------------------------------------------------


class Workload:
    """Everything that will arrive, open-loop items and closed loops, in order of arrival.

    The loop calls `due(now_s)` before a step, submits what it gets, and tells `on_finished` when a request has ended
    in whatever way (finished, failed, refused): that is what releases the next batch of a closed loop. Request ids
    (`rt-0`, `be-0`, ...) count the items of each class in order of arrival.
    """

    def __init__(self, items: Iterable[WorkloadItem] = (), closed_loops: Iterable[ClosedLoopBatches] = ()) -> None:
        self._loops = list(closed_loops)
        self._coming: list[tuple[float, int, WorkloadItem, int]] = []  # arrival, tie-breaker, item, its loop or -1
        self._num_seen = 0
        self._num_named: Counter[RequestClass] = Counter()
        self._loop_of: dict[str, int] = {}  # requests out in the system -> the loop they came from, or -1
        self._num_open = [0] * len(self._loops)  # requests of each loop's current batch that have not ended
        for item in merge(items):
            self._add(item, -1)
        for index, loop in enumerate(self._loops):
            self._start_batch(index, loop.start_s)

    def due(self, now_s: float) -> list[WorkloadItem]:
        """The items with `arrival_s <= now_s` that were not given out before, named, in order of arrival."""
        items = []
        while self._coming and self._coming[0][0] <= now_s:
            _, _, item, loop = heapq.heappop(self._coming)
            request_id = f"{item.request_class.value}-{self._num_named[item.request_class]}"
            self._num_named[item.request_class] += 1
            self._loop_of[request_id] = loop
            items.append(replace(item, request_id=request_id))
        return items

    def next_arrival_s(self) -> float | None:
        """When the next known item arrives; None if nothing comes before some request has ended."""
        return self._coming[0][0] if self._coming else None

    def on_finished(self, item_or_id: WorkloadItem | str, now_s: float) -> None:
        """Records the end of a request that `due` gave out.

        Raises:
            WorkloadError: it was not given out, or its end was already reported.
        """
        request_id = item_or_id if isinstance(item_or_id, str) else item_or_id.request_id
        if request_id not in self._loop_of:
            raise WorkloadError(f"request {request_id!r} is not out: `due` did not give it, or its end was told before")
        loop = self._loop_of.pop(request_id)
        if loop < 0:
            return
        self._num_open[loop] -= 1
        if self._num_open[loop] == 0:
            self._start_batch(loop, now_s)

    @property
    def out(self) -> KeysView[str]:
        """Ids of the items that were given out and whose end has not been reported."""
        return self._loop_of.keys()

    @property
    def exhausted(self) -> bool:
        """Nothing will ever arrive again: no item is left, and no closed loop waits for its batch to end."""
        return not self._coming and not any(self._num_open)

    def _start_batch(self, loop: int, now_s: float) -> None:
        batch = self._loops[loop].next_batch(now_s)
        self._num_open[loop] = len(batch)
        for item in batch:
            self._add(item, loop)

    def _add(self, item: WorkloadItem, loop: int) -> None:
        heapq.heappush(self._coming, (item.arrival_s, self._num_seen, item, loop))
        self._num_seen += 1


def _check_text(prompt: str) -> None:
    """Refuses text that a file cannot hold or a tokenizer cannot read."""
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise WorkloadError(f"prompt: expected at most {MAX_PROMPT_CHARACTERS:,} characters, got {len(prompt):,}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise WorkloadError(f"prompt: character {error.start} is U+{ord(prompt[error.start]):04X}, a lone surrogate, "
                            "half of a character; expected text") from error


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise WorkloadError(f"{name}: expected a positive finite number, got {value!r}")


def _check_range(low: int, high: int) -> None:
    if not 1 <= low <= high:
        raise WorkloadError(f"lengths: expected 1 <= low <= high tokens, got low {low}, high {high}")
