"""`linear(x, w, b)`: x @ w.T + b, with the product shaped for the number of rows. Knows nothing but the two operands.

Decoding multiplies a few rows by large weights, so reading the weights is the cost. torch's own F.linear hands CPUs
that problem in a form its BLAS reads at a third of the memory bandwidth; the same product, asked for differently,
reads two to three times faster. Prefills and larger batches are bound by arithmetic, and there oneDNN (which torch
carries) is ahead of that BLAS. The weights are used as they lie in memory: oneDNN would be up to twice as fast on
weights in its own order, but one row would then take twice as long, and a second copy is not ours to make. The result
equals F.linear to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 4
ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x [T, in], w [out, in], b [out] or None -> [T, out], contiguous.

    On a CPU, fp32, with at most FEW_ROWS rows, `w @ x.T` is computed as a batch of two halves of w: the BLAS splits a
    batch over threads, where it would leave a thin product on one. More rows go to oneDNN, which was ahead on a Zen 4
    with AVX-512 and on a par with AVX2 alone; `bros-ref bench engine` shows what the whole makes of it.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, w, b)
    if x.shape[0] > FEW_ROWS or w.shape[0] % 2:
        return _onednn_linear(x, w, b) if ONEDNN else F.linear(x, w, b)
    rows, columns = w.shape
    halves = w.view(2, rows // 2, columns)
    product = torch.bmm(halves, x.t().expand(2, columns, x.shape[0])).view(rows, x.shape[0])  # [out, T]
    out = product.t().contiguous()
    return out if b is None else out.add_(b)


def _onednn_linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The operator that torch's own compiler emits for CPUs; it has no name in torch's public interface."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return out
