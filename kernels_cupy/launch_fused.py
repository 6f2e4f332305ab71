"""`rope_store`, `add_norm`, `silu_mul`: the work between a layer's products and its attention, in one launch each.

The checks, sizes and launches are the same on every device. No launch allocates memory or waits for the device.
`proof/fused.py` has the formulas in plain torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels_cupy.checks import VECTOR_BYTES, check_caches, check_integers, check_vectors
from kernels_cupy.device import Device, Kernel, cdiv
from kernels_cupy.heads import SCALARS, Heads


def whole_pieces(values: int, dtype: torch.dtype) -> bool:
    """Whether a row of `values` is a whole number of 16-byte pieces, as `add_norm` and `silu_mul` require."""
    return values * dtype.itemsize % VECTOR_BYTES == 0


def rope_store(device: Device, qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
               k_cache: Tensor, v_cache: Tensor, q: Tensor, norms: tuple[Tensor, Tensor] | None = None,
               eps: float = 0.0, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """Rotates queries and keys by their positions. Writes queries to `q`, and keys and values to their slots.

    Args:
        qkv: [T, H + 2 * K, D]: queries, keys and values of each token.
        positions: [T] int32, rows of cos and sin.
        slots: [T] int32, all different; a negative slot marks padding, whose key and value are not stored.
        cos, sin: [positions, R / 2] float32; the first R of D dimensions are rotated.
        k_cache, v_cache: [num_blocks, B, K, D], the dtype of qkv, or float8_e4m3fn; q: [T, H, D].
        norms: weights [D] of an RMS norm of each query and each key, with `eps`; None: no norm.
        k_scale, v_scale: of an fp8 cache, as for `store_kv`; a rotated key is not rounded before.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or layout; nothing was launched.
    """
    for name, tensor in (("qkv", qkv), ("q", q)):
        check_vectors(name, tensor, qkv)
    check_caches(k_cache, v_cache, qkv, (k_scale, v_scale))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_vectors(name, tensor, cos)
        if tensor.dtype != torch.float32 or tensor.dim() != 2 or tensor.shape != cos.shape:
            raise ValueError(f"{name} must be float32 and of cos's shape [positions, R / 2], not {tensor.dtype} "
                             f"{tuple(tensor.shape)}")
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.shape != k_cache.shape or k_cache.shape[3] != q.shape[2] \
            or qkv.shape != (q.shape[0], q.shape[1] + 2 * k_cache.shape[2], q.shape[2]) \
            or 2 * cos.shape[1] > q.shape[2]:
        raise ValueError(f"shapes do not fit: qkv {tuple(qkv.shape)}, q {tuple(q.shape)}, k_cache "
                         f"{tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, cos {tuple(cos.shape)}")
    num_tokens, head_dim = q.shape[0], q.shape[2]
    for name, tensor in (("positions", positions), ("slots", slots)):
        check_integers(name, tensor, (num_tokens,), qkv)
    for tensor in norms or ():
        check_vectors("norms", tensor, qkv)
        if tensor.shape != (head_dim,):
            raise ValueError(f"norms must have shape ({head_dim},), not {tuple(tensor.shape)}")
    heads = Heads(q.shape[1], k_cache.shape[2], head_dim, k_cache.shape[1], q.dtype, k_cache.dtype)
    kernel = heads.kernel("rope_store.cu", "rope_store", ROTARY=2 * cos.shape[1], QK_NORM=int(norms is not None))
    q_norm, k_norm = norms or (qkv, qkv)
    scales = (np.float32(k_scale), np.float32(v_scale)) if heads.is_fp8 else ()
    if num_tokens:
        device.launch(kernel, (cdiv(num_tokens * qkv.shape[1], 4), 1, 1), (128, 1, 1), 0,
                      (qkv, positions, slots, cos, sin, q_norm, k_norm, q, k_cache, v_cache, np.float32(eps),
                       np.int32(num_tokens), *scales))


def add_norm(device: Device, residual: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    """residual += delta, then out = residual / sqrt(mean(residual^2) + eps) * weight, row by row.

    Args:
        residual, delta, out: [T, E]; without a delta the residual stays as it is. weight: [E].

    Raises:
        TypeError, ValueError: as for `rope_store`; rows that are not whole 16-byte pieces.
    """
    added = residual if delta is None else delta
    for name, tensor in (("residual", residual), ("delta", added), ("weight", weight), ("out", out)):
        check_vectors(name, tensor, residual)
    if residual.dim() != 2 or added.shape != residual.shape or out.shape != residual.shape \
            or weight.shape != residual.shape[1:]:
        raise ValueError(f"shapes do not fit: residual {tuple(residual.shape)}, delta {tuple(added.shape)}, weight "
                         f"{tuple(weight.shape)}, out {tuple(out.shape)}")
    rows, hidden = residual.shape
    kernel = _of_rows("add_norm", residual, HIDDEN=hidden, ADD=int(delta is not None))
    if rows:
        device.launch(kernel, (rows, 1, 1), (256, 1, 1), 0, (residual, added, weight, out, np.float32(eps)))


def silu_mul(device: Device, gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up.

    Args:
        gate_up: [T, 2 * I], gates and then ups; out: [T, I].

    Raises:
        TypeError, ValueError: as for `add_norm`.
    """
    for name, tensor in (("gate_up", gate_up), ("out", out)):
        check_vectors(name, tensor, gate_up)
    if out.dim() != 2 or gate_up.shape != (out.shape[0], 2 * out.shape[1]):
        raise ValueError(f"shapes do not fit: gate_up {tuple(gate_up.shape)}, out {tuple(out.shape)}")
    rows, inner = out.shape
    kernel = _of_rows("silu_mul", out, INNER=inner)
    if rows:
        pieces = rows * inner * out.element_size() // VECTOR_BYTES
        device.launch(kernel, (cdiv(pieces, 256), 1, 1), (256, 1, 1), 0, (gate_up, out, np.int32(rows)))


def _of_rows(name: str, rows: Tensor, **constants: int) -> Kernel:
    """The kernel for the dtype of these rows, [T, n], and for `constants` by name."""
    if rows.dtype not in SCALARS:
        raise TypeError(f"{name} takes {', '.join(map(str, SCALARS))}, not {rows.dtype}")
    if not whole_pieces(rows.shape[1], rows.dtype):
        raise ValueError(f"{name}: rows of {rows.shape[1]} values of {rows.dtype} are not whole {VECTOR_BYTES}-byte "
                         "pieces")
    constants = {"SCALAR": SCALARS[rows.dtype], **constants}
    return Kernel(f"{name}.cu", name, tuple((key, str(value)) for key, value in constants.items()))
