"""Other projects' decode kernels on our batches, where they are installed: FlashInfer, flash-attn, vLLM's flash-attn.

They do not support reversed sequences, so their batch fills from the left; the cache has the layout they take. Planning
and allocation done once per batch are not timed. A peer's answer is checked in the same way as ours.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bros_ref.config import cdiv
from kernels_cupy.proof.contract import Batch

FLASHINFER_WORKSPACE_BYTES = 128 << 20
Peer = Callable[[Batch], "Callable[[], Tensor] | None"]


def peers(batch: Batch) -> list[tuple[str, Callable[[], Tensor]]]:
    """(name, call) of every installed peer that serves the batch's sizes; a call returns [S, H, D].

    Raises:
        ValueError: a sequence of the batch is reversed.
    """
    if bool(batch.reversed.any()):
        raise ValueError("peers know no direction: draw a batch with directions=[False, ...]")
    known: dict[str, tuple[str, Peer]] = {"FlashInfer": ("flashinfer", _flashinfer),
                                          "flash-attn": ("flash_attn", _flash_attn),
                                          "vLLM flash-attn": ("vllm.vllm_flash_attn", _vllm)}
    found = []
    for name, (module, prepare) in known.items():
        if _installed(module) and (call := prepare(batch)) is not None:
            found.append((name, call))
    return found


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it would lie in
        return False


def _flashinfer(batch: Batch) -> Callable[[], Tensor] | None:
    h, place = batch.heads, batch.q.device
    if h.dtype is torch.float32:
        return None
    library: Any = importlib.import_module("flashinfer")
    sizes = [cdiv(length, h.block_size) for length in batch.context_lens]
    starts = torch.tensor([0, *sizes]).cumsum(0).to(place, torch.int32)
    indices = torch.tensor([block for blocks in batch.block_lists for block in blocks], dtype=torch.int32, device=place)
    last = torch.tensor([(length - 1) % h.block_size + 1 for length in batch.context_lens], dtype=torch.int32,
                        device=place)
    scratch = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=place)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD")
    wrapper.plan(starts, indices, last, h.num_heads, h.num_kv_heads, h.head_dim, h.block_size, q_data_type=h.dtype,
                 kv_data_type=h.dtype)
    return lambda: wrapper.run(batch.q, (batch.k, batch.v))


def _flash_attn(batch: Batch) -> Callable[[], Tensor] | None:
    h = batch.heads
    if h.dtype is torch.float32 or h.block_size % 256:
        return None  # its pages are multiples of 256 tokens
    library: Any = importlib.import_module("flash_attn")
    return lambda: library.flash_attn_with_kvcache(batch.q[:, None], batch.k, batch.v, cache_seqlens=batch.lengths,
                                                   block_table=batch.tables, causal=True)[:, 0]


def _vllm(batch: Batch) -> Callable[[], Tensor] | None:
    h = batch.heads
    if h.dtype is torch.float32 or h.block_size % 16:
        return None
    library: Any = importlib.import_module("vllm.vllm_flash_attn")
    starts = torch.arange(len(batch.q) + 1, dtype=torch.int32, device=batch.q.device)
    return lambda: library.flash_attn_varlen_func(
        batch.q, batch.k, batch.v, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=max(batch.context_lens),
        seqused_k=batch.lengths, causal=True, block_table=batch.tables)
