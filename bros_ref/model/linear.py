"""The product of activations and weights: the reference, and the interface that a faster one implements."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LinearFn(Protocol):
    """x [T, in], w [out, in], b [out] or None -> x @ w.T + b, [T, out]."""

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor: ...


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The reference, for every device and dtype; see `LinearFn`."""
    return F.linear(x, w, b)
