"""Rotary positions: the angle of every frequency at every position, and the rotation itself. Knows only the config.

The results equal transformers' for each kind of `RopeScaling`; "divisors" is how GGUF files store Llama 3's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bros_ref.config import ModelConfig, RopeScaling


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding in place: turns dimension pairs (d, d + R/2) by the position's angles.

    heads [T, n, R], R the dimensions that turn; cos, sin [T, 1, R / 2].
    """
    left, right = heads.chunk(2, dim=-1)
    turned = left * sin
    left.mul_(cos).addcmul_(right, sin, value=-1)
    right.mul_(cos).add_(turned)


def rope_tables(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin of every position up to max_context_tokens, each [positions, 1, R / 2]."""
    positions = torch.arange(config.max_context_tokens, dtype=torch.float32)
    angles = torch.outer(positions, rotary_frequencies(config))[:, None]
    length = config.rope_scaling.attention_factor if config.rope_scaling else 1.0  # yarn scales q and k by it
    return (angles.cos() * length).to(device, dtype), (angles.sin() * length).to(device, dtype)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair, stretched as `rope_scaling` says: [R / 2] float32."""
    rotary_dim = config.rotary_dim or config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    s = config.rope_scaling
    if s is None:
        return frequencies
    if s.kind == "linear":
        return frequencies / s.factor
    if s.kind == "divisors":
        return frequencies / torch.tensor(s.divisors)
    # Both of the others keep fast frequencies, divide slow ones by the factor and blend those between.
    kept = _kept_by_llama3(frequencies, s) if s.kind == "llama3" else _kept_by_yarn(rotary_dim, config.rope_theta, s)
    return frequencies * (kept + (1 - kept) / s.factor)


def _kept_by_llama3(frequencies: Tensor, s: RopeScaling) -> Tensor:
    turns = s.original_max_context_tokens * frequencies / (2 * math.pi)  # over the original context
    return ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)


def _kept_by_yarn(rotary_dim: int, theta: float, s: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071) blends linearly in the pair's index, between the pairs that turn `beta_fast` and
    `beta_slow` times over the original context."""
    first, last = (rotary_dim * math.log(s.original_max_context_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))
                   for turns in (s.beta_fast, s.beta_slow))
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first or 0.001  # as transformers has it
    return 1 - ((torch.arange(rotary_dim // 2) - first) / width).clamp(0, 1)
