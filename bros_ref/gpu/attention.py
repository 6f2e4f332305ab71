"""Attention by the CUDA kernels, behind the interface that `Decoder` uses. Torch then computes everything else. Models
of the Llama architecture use more kernels than that; see `gpu/decoder.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bros_ref.model.attention import AttentionMetadata

if TYPE_CHECKING:
    from kernels_cupy.device import Device


class KernelAttention:
    """Attention by the kernels: one launch of the decode kernel for the leading sequences that have one new token each,
    and one launch of the prefill kernel for the others.

    Raises (when called):
        ValueError: a context exceeds a sliding window, which the kernels do not have. `Decoder` limits its context to
            the window, so longer requests are refused earlier.
    """

    sliding_windows = False

    def __init__(self, device: Device) -> None:
        self.device = device
        self._meta: AttentionMetadata | None = None  # the step that `_integers` belongs to
        self._integers: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata) -> Tensor:
        from kernels_cupy.launch import paged_attention as decode
        from kernels_cupy.launch_prefill import prefill_attention

        if meta.window is not None:
            raise ValueError(f"the kernels have no sliding windows: a context of {max(meta.context_lens)} tokens "
                             f"exceeds the window of {meta.window}; use the torch backend")
        tables, context_lens, reversed_, query_starts = self._integers_of(meta)
        q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
        n = leading_decodes(meta.query_lens)
        if n:
            decode(self.device, q[:n], k_cache, v_cache, tables[:n], context_lens[:n], reversed_[:n], out[:n])
        if n < len(context_lens):
            prefill_attention(self.device, q[n:], k_cache, v_cache, tables[n:], context_lens[n:], reversed_[n:],
                              query_starts, out[n:])
        return out

    def _integers_of(self, meta: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step's tables and lengths as the kernels take them; made once per step and used by all layers."""
        if self._integers is None or meta is not self._meta:
            place = meta.block_tables.device
            lengths = meta.query_lens[leading_decodes(meta.query_lens):]
            starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._meta = meta
            self._integers = (meta.block_tables.int().contiguous(),
                              torch.tensor(meta.context_lens, dtype=torch.int32).to(place), meta.reversed.int(),
                              starts.to(place))
        return self._integers


def leading_decodes(query_lens: Sequence[int]) -> int:
    """The number of sequences with one new token before the first sequence with several."""
    return next((i for i, length in enumerate(query_lens) if length > 1), len(query_lens))
