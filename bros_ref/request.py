"""One request: what its user asked for, and its progress.

`num_tokens - num_computed_tokens` is the work left. That one subtraction covers prefill, chunked prefill, decode and
the recomputation after a preemption, so no phase flag is needed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field


class RequestClass(enum.Enum):
    """Real-time: someone waits, latency targets hold. Best-effort: a batch job, only throughput counts. (Paper, 1.)"""

    REAL_TIME = "rt"
    BEST_EFFORT = "be"


class RequestStatus(enum.Enum):
    """WAITING: never ran, or lost its KV and starts over. RUNNING: holds KV (it may still sit out an iteration, which
    the paper calls *pending*). The rest are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED_LENGTH = "length"
    FINISHED_STOP = "stop"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def is_end(self) -> bool:
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


@dataclass(frozen=True)
class SLO:
    """Latency targets of a real-time request.

    TTFT = first token time - arrival. TPOT = (last token time - first token time) / (output tokens - 1).

    Raises:
        ValueError: a target is not a positive finite number of seconds.
    """

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"SLO.{name} must be a positive number of seconds, got {value!r}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn, and when to stop. `temperature == 0` is greedy.

    `seed` None: the engine draws a seed for each request and records it in the trace, so that equal prompts give
    different samples and any of them can be repeated.

    The penalties are OpenAI's: a token that was generated c times before has `frequency_penalty * c`, and if c > 0
    `presence_penalty`, taken off its logit. `logprobs` None: none are kept; otherwise each token's log-probability and
    those of that many most likely tokens, in the model's own distribution (before penalties and temperature).

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number, at least 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string must not be empty")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must lie in [-2, 2], got {getattr(self, name)!r}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be None or at least 0, got {self.logprobs}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a generated token was. `top`: the most likely (token id, log-probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False, slots=True)
class Request:
    """A request and its progress. Fields are grouped by who sets them.

    Raises:
        ValueError: an empty prompt, a real-time request without an SLO, a best-effort one with an SLO,
            or an arrival time that is not a finite number.

    `arrival_s` is in seconds on the engine's clock. It may be left out: the engine then sets it, and the deadline that
    follows from it, when the request is added. Until then both are unset.
    """

    # set by the user
    request_id: str
    request_class: RequestClass
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    arrival_s: float = None  # type: ignore[assignment]  # whoever schedules a request finds a number here
    slo: SLO | None = None
    # set by the scheduler
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0  # tokens whose K and V are in the cache (or, after a checkpoint, in host memory)
    num_tokens: int = field(init=False)  # prompt + output so far
    deadline_s: float = math.inf  # when the next token is due; real-time only
    last_step: int = -1  # the step it last ran in
    num_preemptions: int = 0
    # set by the engine
    seed: int | None = None  # of this request's samples; None while it is greedy
    error: BaseException | None = None  # why it FAILED
    output_token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)  # set by the sampler, where `sampling.logprobs` wants it
    # derived once
    is_rt: bool = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_total_tokens: int = field(init=False)  # prompt plus the most it may generate: the room it can come to need

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id!r}: the prompt is empty; it needs at least one token")
        self.is_rt = self.request_class is RequestClass.REAL_TIME
        if self.is_rt and self.slo is None:
            raise ValueError(f"request {self.request_id!r} is real-time and needs an SLO")
        if not self.is_rt and self.slo is not None:
            raise ValueError(f"request {self.request_id!r} is best-effort: an SLO would be ignored; leave it out")
        self.num_prompt_tokens = self.num_tokens = len(self.prompt_token_ids)
        self.max_total_tokens = self.num_prompt_tokens + self.sampling.max_tokens
        self.seed = self.sampling.seed
        if self.arrival_s is not None:
            self.arrive(self.arrival_s)

    def arrive(self, now_s: float) -> None:
        """Sets the arrival time, and with it the first token's deadline.

        Raises:
            ValueError: the time is not a finite number.
        """
        if not math.isfinite(now_s):
            raise ValueError(f"request {self.request_id!r}: arrival_s must be finite, got {now_s!r}")
        self.arrival_s = now_s
        if self.slo is not None:
            self.deadline_s = now_s + self.slo.ttft_s

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far, [num_tokens]."""
        return [*self.prompt_token_ids, *self.output_token_ids]
