"""`linear(x, w, b)`: x @ w.T + b, with the product shaped for the number of rows. Knows nothing but the two operands.

Decoding multiplies a few rows by large weights, so reading the weights is the cost. torch's own F.linear hands CPUs
that problem in a form its BLAS reads at a third of the memory bandwidth; the same product, asked for differently,
reads two to three times faster (numbers: docstring of `linear`). The result equals F.linear to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 64


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x [T, in], w [out, in], b [out] or None -> [T, out], contiguous.

    On a CPU with at most FEW_ROWS rows, `w @ x.T` is computed as a batch of two halves of w: a BLAS splits a batch
    over threads, where it would leave a thin product on one.
    """
    if x.device.type != "cpu" or x.shape[0] > FEW_ROWS or w.shape[0] % 2:
        return F.linear(x, w, b)
    rows, columns = w.shape
    halves = w.view(2, rows // 2, columns)
    product = torch.bmm(halves, x.t().expand(2, columns, x.shape[0])).view(rows, x.shape[0])  # [out, T]
    out = product.t().contiguous()
    return out if b is None else out.add_(b)
