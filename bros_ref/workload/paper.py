"""The paper's workloads (section 4): real-time requests with chat-like lengths, best-effort batches that never run dry.

Lengths of RT requests are drawn from distributions of ours, since the datasets are not part of this project:

    sharegpt  log-normal, fitted to the first two messages of 15,419 ShareGPT_V3 conversations (vLLM's filter) in
              SmolLM2 tokens: median prompt 108 and output 140 tokens, means 235 and 217; ours 96, 127, 206 and 220
    lmsys     log-normal with the means that LMSYS-Chat-1M's authors publish (prompt 69.5, output 214.5 tokens); the
              spread is our assumption
    arxiv     (for BE) log-normal for article -> abstract, fitted to 28,257 pairs of at most 4,096 Llama-2 tokens
    long-8k, long-14k, chat-and-30k
              not in the paper, synthetic: log-normal prompts with a mean of 8,000 and 14,000 tokens (a tenth of the
              latter exceed 30,000), and sharegpt in which a tenth of the prompts have at least 30,000 tokens

BE requests are the paper's: prompt U(512, 1024), output U(32, 128), a new batch when the last of the old one has ended.
The paper does not say how large a batch is. Here it is what the KV pool holds times `BE_DEMAND`, because policies
differ only under memory contention: with less demand any policy is good enough, and with far more the baselines can be
made to look arbitrarily bad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bros_ref.request import SLO, RequestClass
from bros_ref.workload.generate import (
    ClosedLoopBatches,
    LengthSampler,
    Workload,
    WorkloadItem,
    gamma_arrivals,
    lognormal_lengths,
    mixed_lengths,
    open_loop,
    uniform_lengths,
)

PAPER_SLO = SLO(ttft_s=0.4, tpot_s=0.2)
BE_DEMAND = 1.1
MAX_BE_BATCH = 512  # for evaluations: large pools would need more than the seats can serve
RT_LENGTHS: dict[str, tuple[LengthSampler, LengthSampler]] = {
    "sharegpt": (lognormal_lengths(97, 1.40, 1, 1024), lognormal_lengths(127, 1.15, 1, 1024)),
    "lmsys": (lognormal_lengths(38, 1.10, 1, 1024), lognormal_lengths(142, 0.95, 1, 1024)),
}
LONGEST_PROMPT = 31_700  # with an answer of 1,024 tokens it fits a context of 32,768
LONG_LENGTHS: dict[str, tuple[LengthSampler, LengthSampler]] = {
    "long-8k": (lognormal_lengths(4850, 1.0, 1, LONGEST_PROMPT), RT_LENGTHS["sharegpt"][1]),
    "long-14k": (lognormal_lengths(9000, 0.94, 1, LONGEST_PROMPT), RT_LENGTHS["sharegpt"][1]),
    "chat-and-30k": (mixed_lengths(RT_LENGTHS["sharegpt"][0], uniform_lengths(30_000, LONGEST_PROMPT), 0.1),
                     RT_LENGTHS["sharegpt"][1]),
}
BE_LENGTHS: dict[str, tuple[LengthSampler, LengthSampler]] = {
    "paper": (uniform_lengths(512, 1024), uniform_lengths(32, 128)),
    "arxiv": (lognormal_lengths(2600, 0.35, 256, 3800), lognormal_lengths(190, 0.55, 16, 1024)),
}
BE_MEAN_TOKENS = {"paper": 848, "arxiv": 2800}  # prompt + output, for the size of a batch


@dataclass(frozen=True)
class PaperWorkload:
    """A recipe: `build(seed)` gives the same workload for the same seed. Plain data, so it travels to processes.

    Attributes:
        rt_rate_per_s: Poisson arrivals; 0 means no RT at all.
        be_batch: requests of one BE batch; 0 means no BE.
        rt_lengths: a name of `RT_LENGTHS` or `LONG_LENGTHS`, or a dataset's (prompt, output) pairs, drawn with
            replacement.
        cv: coefficient of variation of the gaps between RT arrivals; 1 is Poisson.
        rt_trace: recorded RT requests that replace drawn ones. The gaps are stretched so that the mean rate is
            `rt_rate_per_s`. Each seed replays a different window of `duration_s` that has requests.
    """

    rt_rate_per_s: float
    duration_s: float
    be_batch: int
    slo: SLO = PAPER_SLO
    rt_lengths: str | tuple[tuple[int, int], ...] = "sharegpt"
    be_lengths: str = "paper"
    cv: float = 1.0
    rt_trace: tuple[WorkloadItem, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rt_rate_per_s) and self.rt_rate_per_s >= 0):
            raise ValueError(f"the RT rate must be a finite number of requests per second, at least 0, got "
                             f"{self.rt_rate_per_s!r}")
        if self.rt_trace and not (self.rt_rate_per_s and self.rt_trace[-1].arrival_s > self.rt_trace[0].arrival_s):
            raise ValueError("a trace needs arrivals that are not all at one time, in order, and a rate above 0")
        if not (math.isfinite(self.duration_s) and self.duration_s > 0) or self.be_batch < 0:
            raise ValueError(f"need a positive finite duration and a batch size of at least 0, got "
                             f"{self.duration_s!r} s and {self.be_batch}")

    def build(self, seed: int, only: str | None = None) -> Workload:
        """The workload, or one class of it ("rt" or "be"). Each class has its own random stream, so that leaving one
        out does not change the other."""
        rt_rng, be_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
        items, loops = [], []
        if self.rt_trace and only != "be":
            items = self._window(seed)
        elif self.rt_rate_per_s and only != "be":
            times = gamma_arrivals(self.rt_rate_per_s, self.cv, self.duration_s, rt_rng)
            if isinstance(self.rt_lengths, str):
                samplers = (RT_LENGTHS | LONG_LENGTHS)[self.rt_lengths]
                items = open_loop(times, RequestClass.REAL_TIME, *samplers, rt_rng, self.slo)
            else:
                drawn = rt_rng.integers(len(self.rt_lengths), size=len(times)).tolist()
                pairs = [self.rt_lengths[index] for index in drawn]
                items = [WorkloadItem(time_s, RequestClass.REAL_TIME, prompt, output, self.slo)
                         for time_s, (prompt, output) in zip(times, pairs, strict=True)]
        if self.be_batch and only != "rt":
            loops = [ClosedLoopBatches(self.be_batch, *BE_LENGTHS[self.be_lengths], be_rng)]
        return Workload(items, loops)

    def _window(self, seed: int) -> list[WorkloadItem]:
        """The window of the stretched trace for a seed. Seeds take the windows with requests in turn, and then repeat.
        """
        length_s = self.rt_trace[-1].arrival_s
        stretch = len(self.rt_trace) / self.rt_rate_per_s / length_s
        windows = sorted({int(stretch * item.arrival_s // self.duration_s) for item in self.rt_trace})
        whole = [window for window in windows if (window + 1) * self.duration_s <= stretch * length_s] or windows[:1]
        begin_s = whole[seed % len(whole)] * self.duration_s
        arrivals = ((stretch * item.arrival_s - begin_s, item) for item in self.rt_trace)
        return [replace(item, arrival_s=time_s, slo=self.slo) for time_s, item in arrivals
                if 0 <= time_s < self.duration_s]


def be_batch_for(kv_tokens: int, lengths: str = "paper", demand: float = BE_DEMAND) -> int:
    """Requests of a batch whose KV is `demand` times the pool, at least one."""
    return max(1, round(demand * kv_tokens / BE_MEAN_TOKENS[lengths]))
