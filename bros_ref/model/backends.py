"""Which attention the decoder runs: plain torch, the CUDA kernels on a GPU, or the same kernels emulated on the CPU.

    torch         `paged_attention` of attention.py: any device, the reference
    cupy          the kernels of kernels_cupy through CuPy: the default if there are a GPU and CuPy
    cpu-emulated  the very same kernels, thread by thread on the CPU with every access checked: slow, for study

Kernels are imported only when a kernel backend is chosen. Here torch does all but attention; models of Llama's kind
run on more kernels than that, see `gpu/decoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bros_ref.model.attention import AttentionFn, AttentionMetadata, paged_attention

if TYPE_CHECKING:
    from kernels_cupy.device import Device

BACKENDS = ("auto", "torch", "cupy", "cpu-emulated")


class KernelAttention:
    """Attention by the kernels: one launch of the decode kernel for the sequences in front that have one new token,
    and one of the prefill kernel for the others.

    Raises (when called):
        ValueError: a context exceeds a sliding window, which the kernels do not have. `Decoder` limits its context to
            the window, so that requests are refused before.
    """

    sliding_windows = False

    def __init__(self, device: Device) -> None:
        self.device = device
        self._meta: AttentionMetadata | None = None  # the step whose integers are at hand
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
    """How many sequences with one new token there are before the first with several."""
    return next((i for i, length in enumerate(query_lens) if length > 1), len(query_lens))


def attention_backend(name: str = "auto", device: torch.device | str = "cpu") -> AttentionFn:
    """The attention function of a backend.

    Raises:
        ValueError: an unknown name, or one that does not fit the device.
        RuntimeError: "cupy" without a GPU or CuPy; "cpu-emulated" without a C++ compiler says so when first used.
    """
    kind = torch.device(device).type
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    if (name == "cupy" and kind != "cuda") or (name == "cpu-emulated" and kind != "cpu"):
        raise ValueError(f"backend {name} does not run on device {kind}")
    if name == "cpu-emulated":
        from kernels_cupy.proof.emulator import Emulator

        return KernelAttention(Emulator())
    if name == "cupy" or (name == "auto" and kind == "cuda"):
        from kernels_cupy.gpu import CupyDevice, why_unavailable

        if name == "cupy" or why_unavailable() is None:
            return KernelAttention(CupyDevice())
    return paged_attention
