"""The sizes that an attention kernel is compiled for, and the compile-time constants derived from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels_cupy.device import Kernel

SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # common.cuh's SCALAR
MAX_HEAD_DIM = 256
FP8 = torch.float8_e4m3fn  # of a cache; there a stored value x means x * scale
DECODED = 2.0 ** 8  # kernels decode x to x / DECODED (fp8.cuh); launchers put the factor into the scales
SCALE_LIMIT = 2.0 ** 60  # scales of fp8 caches lie between its inverse and it: then nothing overflows in float32


@dataclass(frozen=True)
class Heads:
    """What a kernel is compiled for.

    Attributes:
        block_size: the number of slots of a KV block.
        dtype: of queries and outputs.
        cache_dtype: of K and V in the cache: that of the queries (what None becomes), or FP8.

    Raises:
        TypeError: a dtype that no kernel takes.
        ValueError: KV heads that do not divide the query heads; rows that are not whole 16-byte pieces of at most
            MAX_HEAD_DIM values; a block without slots.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype not in SCALARS:
            raise TypeError(f"attention kernels take {', '.join(map(str, SCALARS))}, not {self.dtype}")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly")
        if self.cache_dtype is None:
            object.__setattr__(self, "cache_dtype", self.dtype)  # so that equal sizes are equal, however they are given
        if self.cache_dtype not in (self.dtype, FP8):
            raise TypeError(f"with {self.dtype} queries a cache holds {self.dtype} or {FP8}, not {self.cache_dtype}")
        size = 1 if self.is_fp8 else self.dtype.itemsize  # an fp8 row has the fewest bytes
        if self.head_dim < 1 or self.head_dim * size % 16 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim {self.head_dim}: rows must be whole 16-byte pieces of at most {MAX_HEAD_DIM} "
                             f"values, and {self.cache_dtype} has {size} bytes a value")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_fp8(self) -> bool:
        """Whether the cache is FP8."""
        return self.cache_dtype == FP8

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V of all KV heads in the cache."""
        return 2 * self.num_kv_heads * self.head_dim * (1 if self.is_fp8 else self.dtype.itemsize)

    def score_factor(self, scale: float | None, k_scale: float) -> np.float32:
        """What a kernel multiplies a score by: `scale` (None: D ** -0.5), and what an fp8 key was divided by."""
        factor = self.head_dim ** -0.5 if scale is None else scale
        return np.float32(factor * k_scale * DECODED if self.is_fp8 else factor)

    def output_factor(self, v_scale: float) -> tuple[np.float32, ...]:
        """The last argument of a kernel that reads an fp8 cache, what it multiplies its output by; none for others."""
        return (np.float32(v_scale * DECODED),) if self.is_fp8 else ()

    def kernel(self, file: str, function: str, **more: int) -> Kernel:
        """The kernel compiled for these sizes, and for `more` constants by name."""
        constants = {"SCALAR": SCALARS[self.dtype], "HEAD_DIM": self.head_dim, "NUM_HEADS": self.num_heads,
                     "NUM_KV_HEADS": self.num_kv_heads, "BLOCK_SIZE": self.block_size, **more}
        if self.is_fp8:
            constants["KV_FP8"] = 1
        return Kernel(file, function, tuple((name, str(value)) for name, value in constants.items()))
