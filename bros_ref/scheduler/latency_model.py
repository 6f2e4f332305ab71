"""Predicts how long a batch takes: a linear model of the step time, fitted offline and corrected online.

    t_exec = c0 + c1 * new_tokens + c2 * sum over prefills of new * (context + new / 2) + c3 * sum of decode contexts
    T      = max(t_exec, restore_s_per_token * tokens to copy back)          since copies overlap compute

The features and T are the paper's (section on the cost model; it profiles prefill and decode apart). Ours: one
non-negative fit on mixed batches, refit online with forgetting, and a safety factor from the observed P95 of
actual/predicted. Features are sums, so adding one candidate to a batch costs O(1). It sees neither requests nor clocks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

FORGETTING = 0.995  # weight of the past after one more step: a memory of about 200 steps
REFIT_EVERY_STEPS = 16
PRIOR_WEIGHT = 0.05  # how strongly a coefficient that recent steps say nothing about stays where it was
MAX_SAFETY = 2.0
FIRST_FIT_STEPS = (4, 8, 16, 32, 64)  # when a model without an offline fit is fitted to the steps so far
UNLIMITED_TOKENS = 1 << 30


@dataclass(slots=True)
class StepFeatures:
    """What the step time depends on, as sums over a batch. `context` is the tokens computed before this step."""

    new_tokens: int = 0
    prefill_products: float = 0.0  # sum over prefills of new * (context + new / 2)
    decode_contexts: int = 0
    restored_tokens: int = 0

    def add(self, num_new_tokens: int, context: int) -> None:
        self.new_tokens += num_new_tokens
        if num_new_tokens == 1:
            self.decode_contexts += context
        else:
            self.prefill_products += num_new_tokens * (context + num_new_tokens / 2)


class StepLatencyModel:
    """Predicts seconds from `StepFeatures`. Coefficients are per step, token, token pair and context token."""

    def __init__(self, coefficients: Sequence[float] = (0.0, 0.0, 0.0, 0.0), restore_s_per_token: float = 0.0) -> None:
        if len(coefficients) != 4 or not all(math.isfinite(c) and c >= 0 for c in (*coefficients, restore_s_per_token)):
            raise ValueError(f"a latency model needs four finite coefficients >= 0, got {coefficients!r} and "
                             f"restore_s_per_token {restore_s_per_token!r}")
        self.c0, self.c1, self.c2, self.c3 = (float(c) for c in coefficients)
        self.restore_s_per_token = float(restore_s_per_token)
        self.safety = 1.0
        self._offline = np.array(coefficients, dtype=float)
        self._gram = np.zeros((4, 4))
        self._target = np.zeros(4)
        self._peak_weight = np.zeros(4)
        self._ratios: deque[float] = deque(maxlen=256)
        self._recent: list[tuple[float, float, float, float]] = []  # weighted rows since the last refit
        self._first_samples: list[tuple[StepFeatures, float]] | None = None if any(coefficients) else []

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        return (self.c0, self.c1, self.c2, self.c3)

    @property
    def is_fitted(self) -> bool:
        """Whether it can predict: it was fitted offline, or has learned from enough steps."""
        return any(self.coefficients)

    def predict(self, features: StepFeatures) -> float:
        """Seconds of one step, without the safety factor; computation and copies overlap (paper)."""
        return max(self.executing_s(features), self.restore_s_per_token * features.restored_tokens)

    def executing_s(self, features: StepFeatures) -> float:
        """Seconds of one step's computation, without copies."""
        return (self.c0 + self.c1 * features.new_tokens + self.c2 * features.prefill_products
                + self.c3 * features.decode_contexts)

    def cost_s(self, num_new_tokens: int, context: int) -> float:
        """What one more request adds to a step."""
        if num_new_tokens == 1:
            return self.c1 + self.c3 * context
        return self.c1 * num_new_tokens + self.c2 * num_new_tokens * (context + num_new_tokens / 2)

    def max_new_tokens(self, spare_s: float, context: int) -> int:
        """The most tokens, up to UNLIMITED_TOKENS, whose `cost_s` behind `context` tokens is at most `spare_s`.

        From two tokens on, the cost grows with their number, so bisection finds the exact answer, where a closed
        formula would suffer from rounding. A single token costs what a decode costs, which may be more or less.
        """
        longest = 1 + bisect_right(range(2, UNLIMITED_TOKENS + 1), spare_s, key=lambda n: self.cost_s(n, context))
        return longest if longest > 1 or self.cost_s(1, context) <= spare_s else 0

    @classmethod
    def fit(cls, samples: Sequence[tuple[StepFeatures, float]], restore_s_per_token: float = 0.0) -> StepLatencyModel:
        """Non-negative least squares on the relative error of measured (features, seconds).

        Raises:
            ValueError: fewer than four samples, or a duration that is not positive and finite.
        """
        if len(samples) < 4:
            raise ValueError(f"fitting needs at least 4 samples, got {len(samples)}")
        if wrong := [seconds for _, seconds in samples if not 0 < seconds < math.inf]:
            raise ValueError(f"fitting needs finite positive durations in seconds, got {wrong[0]!r}")
        rows = np.array([_row(features) / seconds for features, seconds in samples])
        scale = np.where(rows.max(axis=0) > 0, rows.max(axis=0), 1.0)
        scaled, _ = nnls(rows / scale, np.ones(len(rows)))
        model = cls(tuple(scaled / scale), restore_s_per_token)
        model._ratios.extend(seconds / predicted_s for features, seconds in samples
                             if (predicted_s := model.predict(features)) > 0)  # 0 if samples contradict each other
        model._set_safety()
        return model

    def observe(self, features: StepFeatures, actual_s: float) -> None:
        """Learns from one measured step: notes it, and refits four numbers every REFIT_EVERY_STEPS steps."""
        if not 0 < actual_s < math.inf:
            return
        if self._first_samples is not None and not features.restored_tokens:
            self._learn_first(self._first_samples, features, actual_s)
        predicted_s = self.predict(features)
        if predicted_s <= 0:
            return
        self._ratios.append(actual_s / predicted_s)
        if self.restore_s_per_token * features.restored_tokens >= predicted_s:
            return  # it waited for the copies: that says nothing about what computing costs
        self._recent.append((1.0 / actual_s, features.new_tokens / actual_s, features.prefill_products / actual_s,
                             features.decode_contexts / actual_s))
        if len(self._recent) == REFIT_EVERY_STEPS:
            self._refit()
            self._set_safety()

    def _learn_first(self, samples: list[tuple[StepFeatures, float]], features: StepFeatures, actual_s: float) -> None:
        """Without an offline fit the first steps stand in for one, so that deadlines count from the fifth step on."""
        samples.append((features, actual_s))
        if len(samples) in FIRST_FIT_STEPS:
            fitted = self.fit(samples, self.restore_s_per_token)
            self.c0, self.c1, self.c2, self.c3 = fitted.coefficients
            self._offline, self.safety = fitted._offline, fitted.safety
        if len(samples) == FIRST_FIT_STEPS[-1]:
            self._first_samples = None

    def _refit(self) -> None:
        """Non-negative ridge towards the offline fit: a coefficient that no recent step exercised stays put."""
        # 1. Fold the recent steps into the normal equations, older ones fading.
        rows = np.array(self._recent)
        self._recent.clear()
        weights = FORGETTING ** np.arange(len(rows) - 1, -1, -1)
        self._gram = FORGETTING ** len(rows) * self._gram + (rows.T * weights) @ rows
        self._target = FORGETTING ** len(rows) * self._target + weights @ rows

        # 2. Solve in units in which every feature weighs the same; what is almost forgotten must not blow up.
        self._peak_weight = np.maximum(self._peak_weight, np.diag(self._gram))
        weight = np.maximum(np.diag(self._gram), 1e-6 * self._peak_weight)
        scale = 1 / np.sqrt(np.where(weight > 0, weight, 1.0))
        gram = self._gram * np.outer(scale, scale) + PRIOR_WEIGHT * np.eye(4)
        target = self._target * scale + PRIOR_WEIGHT * self._offline / scale
        factor = np.linalg.cholesky(gram)  # |L^T r - L^-1 b|^2 has the same minimum as r^T G r - 2 b^T r
        scaled, _ = nnls(factor.T, np.linalg.solve(factor, target))
        self.c0, self.c1, self.c2, self.c3 = (float(c) for c in scaled * scale)

    def _set_safety(self) -> None:
        """P95 of actual / predicted over the recent steps, at least 1: deadlines must hold, not just on average."""
        ratios = sorted(self._ratios)  # a tenth of the time that np.quantile takes
        self.safety = min(max(1.0, ratios[math.ceil(0.95 * len(ratios)) - 1]), MAX_SAFETY)


def _row(features: StepFeatures) -> np.ndarray:
    return np.array([1.0, features.new_tokens, features.prefill_products, features.decode_contexts])
