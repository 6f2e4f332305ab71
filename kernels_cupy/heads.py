"""The sizes that an attention kernel is compiled for, and the compile-time constants derived from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels_cupy.device import Kernel

SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # common.cuh's SCALAR
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Heads:
    """What a kernel is compiled for; `block_size` is the number of slots of a KV block.

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

    def __post_init__(self) -> None:
        if self.dtype not in SCALARS:
            raise TypeError(f"attention kernels take {', '.join(map(str, SCALARS))}, not {self.dtype}")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly")
        if self.head_dim < 1 or self.head_dim * self.dtype.itemsize % 16 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim {self.head_dim}: rows must be whole 16-byte pieces of at most {MAX_HEAD_DIM} "
                             f"values, and {self.dtype} has {self.dtype.itemsize} bytes a value")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def kernel(self, file: str, function: str, **more: int) -> Kernel:
        """The kernel compiled for these sizes, and for `more` constants by name."""
        constants = {"SCALAR": SCALARS[self.dtype], "HEAD_DIM": self.head_dim, "NUM_HEADS": self.num_heads,
                     "NUM_KV_HEADS": self.num_kv_heads, "BLOCK_SIZE": self.block_size, **more}
        return Kernel(file, function, tuple((name, str(value)) for name, value in constants.items()))
