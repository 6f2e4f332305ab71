"""The fused kernels' contract: their formulas in plain torch, and checks of one launch on random data, on any device.

The formulas (`turned`, `added_and_normed`, `gated`) compute in the dtype of their arguments: in float64 they are the
reference.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cupy.device import Device
from kernels_cupy.heads import FP8, Heads
from kernels_cupy.launch_fused import add_norm, rope_store, silu_mul
from kernels_cupy.proof.contract import FP8_LARGEST, FP8_SCALES, HALF_ULP, quantised

PADDING = -1


def turned(rows: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Rotary positions of rows [T, n, D], with cos, sin [T, R / 2] of each token, after an RMS norm if there is one."""
    if norm is not None:
        rows = F.rms_norm(rows, rows.shape[-1:], norm, eps)
    pairs, cos, sin = cos.shape[1], cos[:, None], sin[:, None]
    left, right, rest = rows[..., :pairs], rows[..., pairs:2 * pairs], rows[..., 2 * pairs:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)


def added_and_normed(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + delta, its RMS norm times weight); rows [T, E]."""
    total = residual if delta is None else residual + delta
    return total, F.rms_norm(total, total.shape[-1:], weight, eps)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of rows [T, 2 * I]."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def check_rope_store(device: Device, rng: np.random.Generator, heads: Heads, num_tokens: int, rotary: int,
                     qk_norm: bool = False, place: str = "cpu") -> None:
    """Raises AssertionError unless queries, keys and values are right and no other slot was written; one token in four
    is padding. In an fp8 cache keys are the float64 ones, divided by their scale and rounded once, and values are
    `quantised`."""
    rows = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    qkv = _normal(rng, (num_tokens, sum(rows), heads.head_dim), heads.dtype, place)
    qkv[0] /= 100  # beside such a row eps counts
    q_norm, k_norm = (_normal(rng, (heads.head_dim,), heads.dtype, place) for _ in range(2))
    norms = (q_norm, k_norm) if qk_norm else None
    angles = torch.from_numpy(rng.uniform(0, 6, (50, rotary // 2)))
    cos, sin = angles.cos().float().to(place), angles.sin().float().to(place)
    positions = torch.from_numpy(rng.integers(0, 50, num_tokens).astype(np.int32)).to(place)
    num_blocks = num_tokens // heads.block_size + 2
    slots = torch.from_numpy(rng.permutation(num_blocks * heads.block_size)[:num_tokens].astype(np.int32))
    slots[3::4] = PADDING
    caches = [torch.full((num_blocks, heads.block_size, heads.num_kv_heads, heads.head_dim), torch.nan,
                         device=place).to(heads.cache_dtype) for _ in range(2)]
    scales = FP8_SCALES if heads.is_fp8 else (1.0, 1.0)
    q = torch.full((num_tokens, heads.num_heads, heads.head_dim), torch.nan, dtype=heads.dtype, device=place)
    rope_store(device, qkv, positions, slots.to(place), cos, sin, caches[0], caches[1], q, norms, 1e-5,
               *scales)
    of_q, of_k, of_v = torch.split(qkv.double(), list(rows), dim=1)
    turn = cos.double()[positions.long()], sin.double()[positions.long()]
    weights = [norm.double() for norm in norms] if norms else [None, None]
    _close(q, turned(of_q, *turn, weights[0], 1e-5), "a query")
    kept = slots >= 0
    for name, cache, wanted, scale in zip(("a key", "a value"), caches, (turned(of_k, *turn, weights[1], 1e-5), of_v),
                                          scales, strict=True):
        flat = cache.flatten(0, 1).cpu()
        found = flat[slots[kept].long()]
        if heads.is_fp8:
            _nearest(found, wanted.cpu()[kept] / scale, name)
        else:
            _close(found, wanted.cpu()[kept], name)
        others = torch.ones(len(flat), dtype=torch.bool)
        others[slots[kept].long()] = False
        assert bool(flat[others].isnan().all()), f"{name} was written to a slot of another"


def check_add_norm(device: Device, rng: np.random.Generator, rows: int, hidden: int, dtype: torch.dtype,
                   add: bool = True, place: str = "cpu") -> None:
    """Raises AssertionError unless the sum and its norm are right."""
    residual, delta = (_normal(rng, (rows, hidden), dtype, place) for _ in range(2))
    residual[0], delta[0] = residual[0] / 100, delta[0] / 100  # beside such a row eps counts
    weight, out = _normal(rng, (hidden,), dtype, place), torch.full((rows, hidden), torch.nan, dtype=dtype,
                                                                   device=place)
    total = (residual + delta if add else residual).clone()  # rounded to the dtype, as it is stored
    add_norm(device, residual, delta if add else None, weight, out, 1e-5)
    assert torch.equal(residual, total), "the residual"
    _close(out, added_and_normed(total.double(), None, weight.double(), 1e-5)[1], "the norm")


def check_silu_mul(device: Device, rng: np.random.Generator, rows: int, inner: int, dtype: torch.dtype,
                   place: str = "cpu") -> None:
    """Raises AssertionError unless the products are right, for gates of every size too."""
    gate_up = _normal(rng, (rows, 2 * inner), dtype, place)
    gate_up[0, :4] = torch.tensor([-3e4, 200.0, -80.0, 0.0])  # in one row, for they loosen what is allowed there
    out = torch.full((rows, inner), torch.nan, dtype=dtype, device=place)
    silu_mul(device, gate_up, out)
    _close(out, gated(gate_up.double()), "a product")


def check_store_fp8(store: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None], values: Tensor,
                    scales: tuple[float, float]) -> None:
    """Raises AssertionError unless `store(k, v, slots, k_cache, v_cache)` leaves in its slots, and in no other, the
    bytes of torch's own conversion: K is `values`, [T, K, D], and V the same in reverse order."""
    num_tokens = len(values)
    caches = [torch.full((num_tokens + 3, 1, *values.shape[1:]), 0x55, dtype=torch.uint8, device=values.device)
              for _ in range(2)]
    rows, slots = (values, values.flip(0)), torch.arange(num_tokens, dtype=torch.int32, device=values.device) + 2
    store(*rows, slots, caches[0].view(FP8), caches[1].view(FP8))
    for name, cache, row, scale in zip(("a key", "a value"), caches, rows, scales, strict=True):
        wanted, found = quantised(row, scale).view(torch.uint8), cache[2:-1, 0]
        assert torch.equal(found, wanted), f"{name}: {int((found != wanted).sum())} bytes are not torch's"
        assert bool((cache[[0, 1, -1]] == 0x55).all()), f"{name} was written to a slot of another"


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, place: str) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(place, dtype)


def _close(found: Tensor, wanted: Tensor, name: str) -> None:
    """Each value is the float64 one, rounded once, up to float32's own rounding relative to the row's largest."""
    allowed = 1.01 * HALF_ULP.get(found.dtype, 0.0) * wanted.abs() + 2e-6 * wanted.abs().amax(dim=-1, keepdim=True)
    excess = ((found.double() - wanted).abs() / allowed).nan_to_num(nan=torch.inf).max().item()
    assert excess <= 1, f"{name} is off by {excess:.3g} times what rounding allows"


def _nearest(found: Tensor, wanted: Tensor, name: str) -> None:
    """Each fp8 number is the nearest to the float64 one, up to float32's own rounding relative to the row's largest."""
    wanted = wanted.clamp(-FP8_LARGEST, FP8_LARGEST)
    spacing = torch.exp2(torch.floor(torch.log2(wanted.abs())).clamp(min=-6.0) - 3)
    allowed = spacing / 2 + 2e-6 * wanted.abs().amax(dim=-1, keepdim=True)
    excess = ((found.double() - wanted).abs() / allowed).nan_to_num(nan=torch.inf).max().item()
    assert excess <= 1, f"{name} is off by {excess:.3g} times what rounding allows"
